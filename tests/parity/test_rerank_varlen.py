"""The attention of packed sequences by one kernel, as on GPUs; here a simulated kernel stands in for FlashAttention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch.nn import functional
from turned_engine import TurnedEngine

from genserve_backend.rerank import varlen
from genserve_backend.rerank.load import build
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.settings import RerankSettings

DOCUMENTS = ("a", "giant panda", "Paris is the capital of France. " * 9, "", "the panda eats bamboo " * 20)


class SimulatedKernel:
    """What torch's documentation says of ``varlen_attn``, by a mask over all pairs of tokens."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None,
        window_size: tuple[int, int],
        enable_gqa: bool,
        num_splits: int,
    ) -> torch.Tensor:
        self.calls += 1
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert enable_gqa == (query.shape[1] != key.shape[1])
        assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
        assert num_splits == 1
        left, right = window_size
        parts = []
        for sequence in range(len(cu_seq_q) - 1):
            mine = query[cu_seq_q[sequence] : cu_seq_q[sequence + 1]]
            keys = key[cu_seq_k[sequence] : cu_seq_k[sequence + 1]]
            values = value[cu_seq_k[sequence] : cu_seq_k[sequence + 1]]
            rows = torch.arange(len(keys) - len(mine), len(keys))[:, None]
            distance = torch.arange(len(keys)) - rows
            mask = ((distance <= right) | (right < 0)) & ((-distance <= left) | (left < 0))
            attended = functional.scaled_dot_product_attention(
                *(states.transpose(0, 1)[None] for states in (mine, keys, values)),
                attn_mask=mask,
                scale=scale,
                enable_gqa=enable_gqa,
            )
            parts.append(attended[0].transpose(0, 1))
        return torch.cat(parts)


def scores(folder: Path, **settings: Any) -> list[list[float]]:
    chosen = RerankSettings(model_path=folder, score_cache_bytes=0, **settings)
    engine = TurnedEngine(lambda emit: build(chosen, "cpu", emit))
    requests = [RerankRequest(query, DOCUMENTS, None) for query in ("the capital of France", "panda", "panda", " ")]
    return [result.scores for result in engine.results(*requests)]


@pytest.mark.parametrize("prefix_cache_bytes", [0, 2**20])
@pytest.mark.parametrize(
    "make",
    [
        tiny_models.bert_cross_encoder,
        tiny_models.modern_bert_cross_encoder,
        tiny_models.bert_bi_encoder,
        tiny_models.qwen3_causal,
    ],
)
def test_the_kernel_is_given_what_it_needs(
    make: Callable[[Path], Path], prefix_cache_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path)
    expected = scores(folder, prefix_cache_bytes=prefix_cache_bytes)
    kernel = SimulatedKernel()
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(varlen, "serves", lambda query: True)
    for one, other in zip(scores(folder, prefix_cache_bytes=prefix_cache_bytes), expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert kernel.calls


def test_torchs_kernel_takes_these_arguments() -> None:
    assert varlen.varlen_attn is not None
    on_gpu = torch.empty(1, 2, 3, 64, dtype=torch.bfloat16, device="meta")
    assert not varlen.serves(on_gpu), "no GPU"
    fake = type("OnGpu", (), {"is_cuda": True, "dtype": torch.bfloat16, "shape": (1, 2, 3, 64)})()
    assert varlen.serves(fake)
    fake.shape = (1, 2, 3, 20)
    assert not varlen.serves(fake), "no multiple of 8"
    fake.shape, fake.dtype = (1, 2, 3, 64), torch.float32
    assert not varlen.serves(fake)
