"""Contenders of the reranker's comparisons: ways to serve a reranker from one process.

``python perf/compare/rerank_contenders.py NAME CHECKPOINT LOAD.json`` prints JSON. perf/compare/rerank.py and
rerank_prefix.py start one process per contender. They answer calls of their own process without a server in front,
which is an advantage.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compare.engine_task import EngineTask
from compare.rerank_load import Load, Request, Timing, drive
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.settings import RerankSettings
from genserve_backend.worker.messages import Start
from genserve_backend.worker.supervisor import Supervisor

Call = Callable[[Request], Sequence[float]]
SORTED_BATCH = 32
"""The default of sentence-transformers."""


class Model:
    """A cross-encoder as in a web process."""

    def __init__(self, checkpoint: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self._model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()

    @torch.inference_mode()
    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Return the scores of one padded forward."""
        queries, documents = zip(*pairs, strict=True)
        inputs = self._tokenizer(
            list(queries), list(documents), padding=True, truncation="only_second", max_length=512, return_tensors="pt"
        )
        scores: list[float] = self._model(**inputs).logits[:, 0].sigmoid().tolist()
        return scores


def naive(checkpoint: Path, _load: Load) -> Call:
    """Return calls of one padded forward per request behind a lock, like a Triton model without an engine."""
    model, lock = Model(checkpoint), threading.Lock()

    def call(request: Request) -> Sequence[float]:
        with lock:
            return model([(request.query, document) for document in request.documents])

    return call


class Engine:
    """GenServe's engine in its worker, without a server in front."""

    def __init__(self, checkpoint: Path, _load: Load, **settings: Any) -> None:
        chosen = RerankSettings(model_path=checkpoint, score_cache_bytes=0, **settings)
        self._supervisor = Supervisor(Start("genserve_backend.rerank.build:build", chosen, "cpu", "rerank_0"))
        self._supervisor.start()
        self._numbers = count()

    def __call__(self, request: Request) -> Sequence[float]:
        """Return the scores of a request."""
        task = EngineTask(str(next(self._numbers)))
        asked = RerankRequest(request.query, request.documents, None)
        self._supervisor.submit(task, asked, deadline=time.monotonic() + 600)
        scores: list[float] = task.answer.result().scores
        return scores


def offline(checkpoint: Path, load: Load) -> Timing:
    """Score everything in one call, sorted by length: the rate of a server that knows all requests in advance."""
    model = Model(checkpoint)
    pairs = [(request.query, document) for request in load.requests for document in request.documents]
    model(pairs[:SORTED_BATCH])
    started = time.monotonic()
    order = sorted(range(len(pairs)), key=lambda index: -len(pairs[index][1]))
    scores = dict[int, float]()
    for start in range(0, len(order), SORTED_BATCH):
        batch = order[start : start + SORTED_BATCH]
        scores.update(zip(batch, model([pairs[index] for index in batch]), strict=True))
    seconds = time.monotonic() - started
    ordered = iter(scores[index] for index in range(len(pairs)))
    per_request = [[next(ordered) for _ in request.documents] for request in load.requests]
    return Timing(seconds, [seconds] * len(load.requests), per_request)


CALLS: dict[str, Callable[[Path, Load], Call]] = {
    "engine": Engine,
    "engine-without-prefixes": partial(Engine, prefix_cache_bytes=0),
    "naive": naive,
}


def main(name: str, checkpoint_path: str, load_path: str) -> None:
    """Run one contender under the load."""
    checkpoint = Path(checkpoint_path)
    load = Load.from_json(Path(load_path).read_text(encoding="utf-8"))
    timing = offline(checkpoint, load) if name == "offline" else drive(CALLS[name](checkpoint, load), load)
    print(timing.to_json(), flush=True)
    os._exit(0)  # even if other threads still run; the engine's worker ends with its parent


if __name__ == "__main__":
    main(*sys.argv[1:4])
