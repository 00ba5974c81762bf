"""RERANK_COMPILE changes no score, also for batches of sizes that were not compiled before, and may fail."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from transformers import AttentionInterface
from turned_engine import TurnedEngine

from genserve_backend.rerank import scorers
from genserve_backend.rerank.attention import PACKED, packed_attention
from genserve_backend.rerank.build import build
from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.scorers import base, build_scorer
from genserve_backend.settings import RerankSettings

DOCUMENTS = ("a", "giant panda", "Paris is the capital of France. " * 9, "", "the panda eats bamboo " * 20)
WORDS = ("panda", "bamboo", "Paris", "the", "capital")
MAX_GRAPHS = 16
"""Four parts of the decoder, each for one and several sequences, and before and after torch knows which sizes vary."""

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")


@pytest.fixture(autouse=True)
def reset_compilation() -> Any:
    yield
    AttentionInterface.register(PACKED, packed_attention)
    torch._dynamo.reset()


def scores(folder: Path, *, compiled: bool) -> list[list[float]]:
    settings = RerankSettings(model_path=folder, score_cache_bytes=0, compiled=compiled, max_num_batched_tokens=200)
    engine = TurnedEngine(lambda emit: build(settings, "cpu", emit))
    requests = [RerankRequest(query, DOCUMENTS, None) for query in ("the capital of France", "panda", "panda", " ")]
    return [result.scores for result in engine.results(*requests)]


@pytest.mark.parametrize("make", [tiny_models.bert_cross_encoder, tiny_models.qwen3_causal])
def test_compiled_scores_equal_eager_scores(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path)
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for one, other in zip(scores(folder, compiled=True), scores(folder, compiled=False), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    assert graphs["unique_graphs"] > before


def test_compiled_decoder_has_few_graphs_and_equal_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder of GPUs. Its graphs are the same for all layers, numbers of documents and lengths."""
    folder = tiny_models.qwen3_causal(tmp_path, layers=6)
    expected = scores(folder, compiled=False)
    monkeypatch.setattr(base, "can_fuse", lambda model, device: True)
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    settings = RerankSettings(model_path=folder, compiled=True, max_num_batched_tokens=400)
    scorer = build_scorer(RerankCheckpoint.load(folder), settings, "cpu")
    assert scorer.compiled
    warm = graphs["unique_graphs"] - before
    assert 4 <= warm <= MAX_GRAPHS
    draw = random.Random(4)
    for _ in range(50):
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(0, 40))) for _ in range(draw.randint(1, 9))]
        request = RerankRequest(draw.choice(WORDS), tuple(texts), None)
        sequences = [sequence for part in scorer.tokenize(request) for sequence in part.sequences]
        assert scorer.forward(sequences).isfinite().all()
    assert graphs["unique_graphs"] - before == warm, "requests compile nothing"
    for one, other in zip(scores(folder, compiled=True), expected, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("is_fused", [True, False], ids=["decoder", "transformers"])
def test_model_that_cannot_be_compiled_runs_without(
    is_fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_models.qwen3_causal(tmp_path)
    expected = scores(folder, compiled=False)
    monkeypatch.setattr(base, "can_fuse", lambda model, device: is_fused)

    def fail(*_: Any) -> None:
        raise RuntimeError("no C++ compiler\nfound")

    monkeypatch.setattr(base.TorchScorer, "warm_up", fail)
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for one, other in zip(scores(folder, compiled=True), expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert graphs["unique_graphs"] == before, "no request tries again"
    (record,) = [record for record in caplog.records if "without torch.compile" in record.message]
    assert "no C++ compiler" in record.__dict__["fields"]["reason"]
    assert record.__dict__["fields"]["setting"] == "RERANK_COMPILE"


@pytest.mark.parametrize("compiled", [None, False])
def test_model_on_a_gpu_is_compiled_unless_that_is_switched_off(
    compiled: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the scorer, which has no GPU here."""
    asked: list[bool] = []
    warmed: list[int] = []

    class Scorer:
        def __init__(self, *_: Any, compiled: bool, **__: Any) -> None:
            asked.append(compiled)
            self.compiled = compiled

        def warm_up(self, tokens: int) -> None:
            warmed.append(tokens)

    folder = tiny_models.qwen3_causal(tmp_path)
    monkeypatch.setitem(scorers.SCORERS, "causal", Scorer)
    given = {} if compiled is None else {"compiled": compiled}
    settings = RerankSettings(model_path=folder, **given)
    build_scorer(RerankCheckpoint.load(folder), settings, "cuda:0")
    assert asked == [compiled is None]
    assert warmed == ([16_384] if compiled is None else [])
