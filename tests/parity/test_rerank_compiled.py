"""RERANK_COMPILE changes no score, also for batches of sizes that were not compiled before."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from transformers import AttentionInterface
from turned_engine import TurnedEngine

from genserve_backend.rerank.attention import PACKED, packed_attention
from genserve_backend.rerank.build import build
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.settings import RerankSettings

DOCUMENTS = ("a", "giant panda", "Paris is the capital of France. " * 9, "", "the panda eats bamboo " * 20)

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
