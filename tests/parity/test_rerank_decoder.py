"""The decoder of GPUs, on a CPU, against transformers' layers: same scores with cached, packed and evicted prefixes."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from test_rerank_varlen import SimulatedKernel
from transformers import (
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)
from turned_engine import TurnedEngine

from genserve_backend.rerank import varlen
from genserve_backend.rerank.build import build
from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.decoder import PackedDecoder
from genserve_backend.rerank.packing import prepare_packing
from genserve_backend.rerank.prefix import Prefix, PrefixCache
from genserve_backend.rerank.prefix_store import PrefixStore, Shape
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.scorers import base, build_scorer
from genserve_backend.rerank.scorers.base import PrefixLost, TorchScorer
from genserve_backend.rerank.scorers.causal import Causal
from genserve_backend.rerank.scorers.layouts import Packed, TokenSequence
from genserve_backend.settings import RerankSettings

DOCUMENTS = ("a", "giant panda", "Paris is the capital of France. " * 9, "", "the panda eats bamboo " * 20)
QUERIES = ("the capital of France", "panda", "panda", " ")
LARGE = 2**20
ROOM_FOR_ONE = 16_000
"""Bytes of a cache that holds the template's tokens and about one query's."""

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "vocab_size": 99,
    "pad_token_id": 0,
}
MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaModel, LlamaConfig(**SIZES, num_hidden_layers=3, attention_bias=True, mlp_bias=True)),
    "llama, one layer": (LlamaModel, LlamaConfig(**SIZES, num_hidden_layers=1, head_dim=16)),
    "mistral": (MistralModel, MistralConfig(**SIZES, num_hidden_layers=2, sliding_window=5)),
    "qwen2": (
        Qwen2Model,
        Qwen2Config(**SIZES, num_hidden_layers=3, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    ),
    "qwen3": (Qwen3Model, Qwen3Config(**SIZES, num_hidden_layers=3, head_dim=8)),
}


@pytest.fixture(params=["one call per sequence", "one kernel"])
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    varlen.find_kernel.cache_clear()
    if request.param == "one kernel":
        monkeypatch.setattr(varlen, "varlen_attn", SimulatedKernel())
        monkeypatch.setattr(varlen, "serves", lambda query: True)
    yield
    varlen.find_kernel.cache_clear()


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the decoder on a CPU, too."""
    monkeypatch.setattr(base, "can_fuse", lambda model, device: True)


def randomized(kind: Any, config: Any) -> Any:
    """A model whose biases and norms are random, too."""
    torch.manual_seed(3)
    model = kind(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.5)
    return model


def layout(batch: list[TokenSequence], cache: PrefixCache, store: PrefixStore) -> Packed:
    plan = cache.plan([sequence.prefix for sequence in batch])
    lengths = [*(each.length for each in batch), *(len(entry.prefix.new_ids) for entry in plan.missing)]
    return Packed(
        batch,
        last=True,
        plan=plan,
        placed=store.place(plan, lengths),
        first_position=0,
        one_position=True,
        types=False,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("attention")
@torch.inference_mode()
def test_decoder_equals_transformers(name: str) -> None:
    kind, config = MODELS[name]
    reference, plain, taken = (randomized(kind, copy.deepcopy(config)) for _ in range(3))
    prepare_packing(plain, one_position=True)
    decoder = PackedDecoder(taken)
    lead = Prefix((5, 6, 7))
    query = Prefix((5, 6, 7, 8, 9), lead)
    batches = [
        [TokenSequence([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [], 0), TokenSequence([4], [], 1)],
        [
            TokenSequence([5, 6, 7, 8, 9, 1], [], 0, prefix=query),
            TokenSequence([5, 6, 7, 11, 12, 13, 14, 15, 16, 17], [], 1, prefix=lead),
            TokenSequence([3, 3, 2], [], 2),
        ],
        [TokenSequence([5, 6, 7, 8, 9, 40, 41, 42], [], 0, prefix=query)],
    ]
    shape = Shape.of(config, torch.float32)
    states = [
        (model, PrefixCache(slots=20), PrefixStore(shape, slots=20, device=torch.device("cpu")))
        for model in (plain, decoder)
    ]
    for batch in batches:
        results = [
            model(**layout(batch, cache, store).inputs, use_cache=False).last_hidden_state[: len(batch)]
            for model, cache, store in states
        ]
        assert results[0].abs().max() > 0.1
        torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
        for sequence, found in zip(batch, results[1], strict=True):
            alone = reference(input_ids=torch.tensor([sequence.ids])).last_hidden_state[:, -1]
            torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


def scores(folder: Path, **settings: Any) -> list[list[float]]:
    chosen = RerankSettings(model_path=folder, score_cache_bytes=0, **settings)
    engine = TurnedEngine(lambda emit: build(chosen, "cpu", emit))
    return [result.scores for result in engine.results(*(RerankRequest(query, DOCUMENTS, None) for query in QUERIES))]


@pytest.mark.parametrize("budget", [100, 16_384])
@pytest.mark.parametrize("prefix_cache_bytes", [0, 1, ROOM_FOR_ONE, LARGE])
def test_scores_of_the_decoder_equal_those_of_transformers(
    prefix_cache_bytes: int, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_models.qwen3_causal(tmp_path)
    expected = scores(folder, prefix_cache_bytes=0)
    monkeypatch.setattr(base, "can_fuse", lambda model, device: True)
    limits = {"prefix_cache_bytes": prefix_cache_bytes, "max_num_batched_tokens": budget}
    for one, other in zip(scores(folder, **limits), expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def scorer(folder: Path, prefix_cache_bytes: int) -> TorchScorer:
    settings = RerankSettings(model_path=folder, prefix_cache_bytes=prefix_cache_bytes)
    made = build_scorer(RerankCheckpoint.load(folder), settings, "cpu")
    assert isinstance(made, Causal)
    return made


def sequences(made: TorchScorer, *queries: str) -> list[TokenSequence]:
    requests = [RerankRequest(query, DOCUMENTS, None) for query in queries]
    return [sequence for request in requests for part in made.tokenize(request) for sequence in part.sequences]


@pytest.mark.parametrize("decoder", [False, True], ids=["transformers", "decoder"])
def test_missing_prefixes_are_part_of_the_forward_that_needs_them(
    decoder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "can_fuse", lambda model, device: decoder)
    folder = tiny_models.qwen3_causal(tmp_path)
    made, plain = scorer(folder, LARGE), scorer(folder, 0)
    calls: list[int] = []
    outputs = made.outputs

    def counted(layout: Any, inputs: dict[str, Any]) -> torch.Tensor:
        calls.append(inputs["input_ids"].shape[1])
        return outputs(layout, inputs)

    monkeypatch.setattr(made, "outputs", counted)
    expected = plain.forward(sequences(plain, *QUERIES))
    batch = sequences(made, *QUERIES)
    own = sum(sequence.length for sequence in batch)
    torch.testing.assert_close(made.forward(batch), expected, atol=1e-5, rtol=1e-5)
    computed = made.prefix_tokens_computed
    used = {prefix.ids: prefix for each in batch if (prefix := each.prefix)}
    used |= {prefix.parent.ids: prefix.parent for prefix in used.values() if prefix.parent}
    wanted = sum(len(prefix.new_ids) for prefix in used.values())
    assert computed == wanted, "each prefix is computed once, whichever requests share it"
    assert calls == [own + computed], "in the same forward"
    torch.testing.assert_close(made.forward(batch), expected, atol=1e-5, rtol=1e-5)
    assert calls[1:] == [own]
    assert made.prefix_tokens_computed == computed


def test_forward_survives_the_eviction_of_its_prefixes_by_the_next_one(tmp_path: Path) -> None:
    folder = tiny_models.qwen3_causal(tmp_path)
    made, plain = scorer(folder, ROOM_FOR_ONE), scorer(folder, 0)
    one, other = (sequences(made, query) for query in ("the capital of France", "what is the capital of the country"))
    expected = [plain.forward(sequences(plain, query)) for query in ("the capital of France", "panda")]
    for _ in range(3):
        launched = [made.launch(batch) for batch in (one, other, sequences(made, "panda"))]
        torch.testing.assert_close(launched[0].outputs(), expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(launched[2].outputs(), expected[1], atol=1e-5, rtol=1e-5)
    assert made.prefix_tokens_computed > sum(len(each[0].prefix.ids) for each in (one, other) if each[0].prefix)


def test_failed_launch_leaves_no_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_models.qwen3_causal(tmp_path)
    made, plain = scorer(folder, LARGE), scorer(folder, 0)
    expected = plain.forward(sequences(plain, "panda"))
    batch = sequences(made, "panda")

    def fail(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("device error")

    with monkeypatch.context() as broken:
        broken.setattr(made, "outputs", fail)
        with pytest.raises(torch.OutOfMemoryError):
            made.forward(batch)
    assert len(made._prefixes) == 0
    torch.testing.assert_close(made.forward(batch), expected, atol=1e-5, rtol=1e-5)


def test_forward_that_read_a_lost_prefix_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first forward fails late; the second one is queued by then and reads the prefixes of the first."""
    folder = tiny_models.qwen3_causal(tmp_path)
    made, plain = scorer(folder, LARGE), scorer(folder, 0)
    expected = plain.forward(sequences(plain, "panda"))
    batch = sequences(made, "panda")

    class Event:
        def synchronize(self) -> None:
            raise torch.OutOfMemoryError("device error")

    with monkeypatch.context() as failing:
        failing.setattr(base, "copy_back", lambda tensor: (tensor, Event()))
        first = made.launch(batch)
    second = made.launch(batch)
    with pytest.raises(torch.OutOfMemoryError):
        first.outputs()
    with pytest.raises(PrefixLost):
        second.outputs()
    computed = made.prefix_tokens_computed
    torch.testing.assert_close(made.forward(batch), expected, atol=1e-5, rtol=1e-5)
    assert made.prefix_tokens_computed > computed


def test_token_ids_become_int32_in_the_tokenization_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[str] = set()
    made: list[TokenSequence] = []
    post_init = TokenSequence.__post_init__

    def recorded(sequence: TokenSequence) -> None:
        post_init(sequence)
        threads.add(threading.current_thread().name)
        made.append(sequence)

    monkeypatch.setattr(TokenSequence, "__post_init__", recorded)
    scores(tiny_models.qwen3_causal(tmp_path))
    assert threads == {"tokenize"}
    assert {str(sequence.new_ids.dtype) for sequence in made} == {"int32"}
    assert all(sequence.new_ids.tolist() == sequence.ids[-sequence.length :] for sequence in made)
