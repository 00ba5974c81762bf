"""Attention over packed sequences in one kernel, as on GPUs, with a simulated kernel in place of FlashAttention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch.nn import functional
from turned_engine import TurnedEngine

from genserve_backend.rerank import varlen
from genserve_backend.rerank.attention import choose_kernels
from genserve_backend.rerank.build import build
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.settings import RerankSettings

DOCUMENTS = ("a", "giant panda", "Paris is the capital of France. " * 9, "", "the panda eats bamboo " * 20)


class SimulatedKernel:
    """``varlen_attn`` as documented for torch 2.13, simulated with a mask over all pairs of tokens."""

    takes_groups = True
    """True if keys may have fewer heads than queries."""
    takes_splits = True
    """True if the build supports ``num_splits``."""

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
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
        num_splits: int | None = None,
    ) -> torch.Tensor:
        self.calls += 1
        grouped = query.shape[1] != key.shape[1]
        if grouped and not (self.takes_groups and enable_gqa):
            raise ValueError("Try setting enable_gqa=True for GQA.")
        if num_splits is not None and not self.takes_splits:
            raise RuntimeError("num_splits is not supported with FlashAttention-2")
        return self.attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)

    @staticmethod
    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        scale: float | None,
        window_size: tuple[int, int],
    ) -> torch.Tensor:
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
        left, right = window_size
        parts = []
        for sequence in range(len(cu_seq_q) - 1):
            queries = query[cu_seq_q[sequence] : cu_seq_q[sequence + 1]]
            keys = key[cu_seq_k[sequence] : cu_seq_k[sequence + 1]]
            values = value[cu_seq_k[sequence] : cu_seq_k[sequence + 1]]
            positions = torch.arange(len(keys) - len(queries), len(keys))[:, None]
            distance = torch.arange(len(keys)) - positions
            mask = ((distance <= right) | (right < 0)) & ((-distance <= left) | (left < 0))
            attended = functional.scaled_dot_product_attention(
                *(states.transpose(0, 1)[None] for states in (queries, keys, values)),
                attn_mask=mask,
                scale=scale,
                enable_gqa=queries.shape[1] != keys.shape[1],
            )
            parts.append(attended[0].transpose(0, 1))
        return torch.cat(parts)


class Torch212(SimulatedKernel):
    """torch 2.12: ``num_splits`` is in the signature, but its FlashAttention-2 build rejects it."""

    takes_splits = False


class Torch211(SimulatedKernel):
    """torch 2.11: neither ``enable_gqa`` nor ``num_splits``; the kernel itself supports groups."""

    def __call__(  # type: ignore[override]
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> torch.Tensor:
        self.calls += 1
        if query.shape[1] != key.shape[1] and not self.takes_groups:
            raise RuntimeError("Number of heads in key/value must equal that in query")
        return self.attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


class Torch211WithoutGroups(Torch211):
    """torch 2.11 with a kernel that does not support groups."""

    takes_groups = False


class Wrong(SimulatedKernel):
    """A kernel that ignores the window."""

    def __call__(self, *arguments: Any, window_size: tuple[int, int], **options: Any) -> torch.Tensor:
        return super().__call__(*arguments, window_size=(-1, window_size[1]), **options)


class Missing(SimulatedKernel):
    """A build without the kernel."""

    def __call__(self, *arguments: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("USE_FLASH_ATTENTION was not enabled for build.\nmore")


KERNELS: dict[str, tuple[type[SimulatedKernel], varlen.Kernel | None]] = {
    "2.13": (SimulatedKernel, varlen.Kernel(frozenset({"enable_gqa", "num_splits"}))),
    "2.12": (Torch212, varlen.Kernel(frozenset({"enable_gqa"}))),
    "2.11": (Torch211, varlen.Kernel(frozenset())),
    "2.11-without-groups": (Torch211WithoutGroups, varlen.Kernel(frozenset(), repeat_heads=True)),
    "wrong": (Wrong, None),
    "missing": (Missing, None),
}


@pytest.fixture(autouse=True)
def reset_find_kernel() -> Iterator[None]:
    varlen.find_kernel.cache_clear()
    yield
    varlen.find_kernel.cache_clear()


@pytest.mark.parametrize("version", KERNELS)
def test_kernel_options_match_the_torch_version(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel, expected = KERNELS[version]
    monkeypatch.setattr(varlen, "varlen_attn", kernel())
    assert varlen.find_kernel(torch.device("cpu"), torch.bfloat16) == expected
    warnings = [record.__dict__["fields"]["reason"] for record in caplog.records]
    assert bool(warnings) == (expected is None)
    if version == "missing":
        assert warnings == ["USE_FLASH_ATTENTION was not enabled for build."]
    if version == "wrong":
        assert "differ from float32" in warnings[0]


def test_torch_without_the_kernel_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", None)
    assert varlen.find_kernel(torch.device("cpu"), torch.bfloat16) is None


def scores(folder: Path, **settings: Any) -> list[list[float]]:
    chosen = RerankSettings(model_path=folder, score_cache_bytes=0, **settings)
    engine = TurnedEngine(lambda emit: build(chosen, "cpu", emit))
    requests = [RerankRequest(query, DOCUMENTS, None) for query in ("the capital of France", "panda", "panda", " ")]
    return [result.scores for result in engine.results(*requests)]


@pytest.mark.parametrize("version", ["2.13", "2.12", "2.11", "2.11-without-groups"])
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
def test_scores_with_the_kernel_equal_those_without(
    make: Callable[[Path], Path],
    prefix_cache_bytes: int,
    version: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make(tmp_path)
    expected = scores(folder, prefix_cache_bytes=prefix_cache_bytes)
    kernel = KERNELS[version][0]()
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(varlen, "serves", lambda query: True)
    for one, other in zip(scores(folder, prefix_cache_bytes=prefix_cache_bytes), expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert kernel.calls


def test_unsupported_queries_do_not_use_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "find_kernel", lambda device, dtype: varlen.Kernel(frozenset()))
    on_cpu = torch.empty(1, 2, 3, 64, dtype=torch.bfloat16)
    assert not varlen.serves(on_cpu), "no GPU"
    shape = (1, 2, 3, 64)
    fake = type("OnGpu", (), {"is_cuda": True, "dtype": torch.bfloat16, "shape": shape, "device": "cuda:0"})()
    assert varlen.serves(fake)
    fake.shape = (1, 2, 3, 20)
    assert not varlen.serves(fake), "no multiple of 8"
    fake.shape = (1, 2, 3, 512)
    assert not varlen.serves(fake), "too wide"
    fake.shape, fake.dtype = shape, torch.float32
    assert not varlen.serves(fake), "not half precision"
    fake.dtype = torch.bfloat16
    monkeypatch.setattr(varlen, "find_kernel", lambda device, dtype: None)
    assert not varlen.serves(fake), "no kernel that works"


def test_cudnn_attention_is_disabled_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", asked.append)
    monkeypatch.setattr(varlen, "find_kernel", lambda *arguments: asked.append(arguments))
    choose_kernels(torch.device("cpu"), torch.bfloat16)
    assert asked == []
    choose_kernels(torch.device("cuda:0"), torch.bfloat16)
    assert asked == [False, (torch.device("cuda:0"), torch.bfloat16)]
    choose_kernels(torch.device("cuda:0"), torch.float32)
    assert asked[2:] == [False]


def test_installed_torch_has_the_kernel_and_its_options() -> None:
    options = inspect.signature(varlen.varlen_attn).parameters.keys()
    assert {"scale", "window_size", "enable_gqa", "num_splits"} <= options
