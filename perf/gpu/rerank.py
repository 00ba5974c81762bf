"""Qwen3-Reranker's true shapes: forwards by tokens and document length, and documents per second as served."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, product, zip_longest
from pathlib import Path
from typing import Any

from genserve_backend.rerank.build import build
from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.scorers import build_scorer
from genserve_backend.rerank.scorers.base import Scorer
from genserve_backend.rerank.scorers.layouts import TokenSequence
from genserve_backend.settings import SIZE_LIMITS, RerankSettings
from gpu.driver import ThreadedDriver
from gpu.part import Run
from gpu.rerank_models import Arithmetic, Padded, checkpoint, requests
from gpu.variants import RERANK_VARIANTS

DOCUMENTS = (200, 64, 500, 2000)
"""Tokens of a document."""
BUDGETS = (16_384, 2_048, 8_192, 32_768)
"""Tokens of a forward."""
QUERIES = 4
"""Requests that share a forward."""
PROFILED = {(200, 2_048), (200, 16_384), (64, 16_384)}
LOADS: dict[str, tuple[int, int, tuple[int, int]]] = {
    "100 documents each, of 200 tokens": (16, 100, (200, 200)),
    "100 documents each, of 20 to 500 tokens": (16, 100, (20, 500)),
    "10 documents each, of 200 tokens": (160, 10, (200, 200)),
}
"""Requests at once, their documents, and the tokens of a document."""
PROFILED_PART = 4
"""Divisor of a load's requests under the profiler, which takes far longer than the requests."""
COMPARED_PAIRS = 640
"""Pairs of each load for transformers, which is slower."""
PADDED_BATCH = 32


def settings(folder: Path, model: str, variant: str, **others: Any) -> RerankSettings:
    """Return an engine's settings, without the score cache."""
    options = RERANK_VARIANTS[variant].prepare(RerankSettings.model_fields)
    size = {"model_size": model} if model in SIZE_LIMITS else {}
    return RerankSettings.model_validate(
        {"model_path": folder, "dtype": "bfloat16", "score_cache_bytes": 0, **size, **options, **others}
    )


def forwards(run: Run) -> None:
    """Write the milliseconds of a forward by document length, tokens and use of shared prefixes."""
    model, variant = run.values["model"], run.values["variant"]
    folder = checkpoint(model, run.scratch, run.device)
    budgets, lengths = ((256,), (20, 60)) if run.tiny else (BUDGETS, DOCUMENTS)
    started = time.monotonic()
    scorer = build_scorer(RerankCheckpoint.load(folder), settings(folder, model, variant), run.device)
    run.clock.wait()
    loaded_s = time.monotonic() - started
    run.result("starts", what=f"rerank {model}", variant=variant, loaded_s=loaded_s, **run.clock.memory())
    for prefix, budget, length in product((True, False), budgets, lengths):
        named = {"model": model, "variant": variant, "prefix": prefix, "document": length}
        is_profiled = run.tiny or (length, budget) in PROFILED
        with run.isolate("rerank-forwards", **named, tokens=budget):
            _forward(run, scorer, named, _batch(scorer, length, budget, prefix=prefix), is_profiled=is_profiled)
    _tokenizer_rate(run, scorer)


def _tokenizer_rate(run: Run, scorer: Scorer) -> None:
    """Write the tokenizer thread's tokens per second."""
    (asked,) = requests(1, 10 if run.tiny else 1000, (200, 200))
    started = time.perf_counter()
    tokens = sum(len(sequence.ids) for each in scorer.tokenize(asked) for sequence in each.sequences)
    seconds = time.perf_counter() - started
    run.result("rerank-tokenizer", model=run.values["model"], tokens=tokens, tokens_per_s=tokens / seconds)


def _forward(run: Run, scorer: Scorer, row: dict[str, Any], batch: list[TokenSequence], *, is_profiled: bool) -> None:
    """Write the milliseconds of one forward."""
    lengths = [sequence.length for sequence in batch]
    flops = Arithmetic.of(row["model"]).flops(lengths, [len(sequence.ids) for sequence in batch])
    forward = partial(scorer.forward, batch)
    run.clock.forget_peak()
    timing = run.clock.run(forward, seconds=0.8)
    peak_mb = run.clock.memory()["peak_mb"]
    named = {**row, "tokens": sum(lengths), "sequences": len(batch)}
    result = {
        "first_ms": timing.first_ms,
        "device_ms": timing.device_ms,
        "row_ms": timing.row_ms,
        "spread": timing.spread,
        "tokens_per_s": sum(lengths) / timing.row_ms * 1000,
        "pairs_per_s": len(batch) / timing.row_ms * 1000,
        "tflops": flops / timing.row_ms / 1e9,
        "peak_mb": peak_mb,
    }
    if is_profiled:
        result["idle"] = _idle(run, named, forward, row_ms=timing.row_ms)
    run.result("rerank-forwards", **named, **result)


def _batch(scorer: Scorer, length: int, budget: int, *, prefix: bool) -> list[TokenSequence]:
    """Return sequences of several queries in turn up to the budget of tokens, with or without their prefix."""
    count = max(1, budget // length // QUERIES + 1)
    asked = requests(QUERIES, min(count, 1000), (length, length))
    by_request = [list(chain.from_iterable(each.sequences for each in scorer.tokenize(request))) for request in asked]
    batch: list[TokenSequence] = []
    tokens = 0
    for each in chain.from_iterable(zip_longest(*by_request)):
        sequence = each if prefix or each is None else replace(each, prefix=None)
        if sequence is None or (batch and tokens + sequence.length > budget):
            break
        batch.append(sequence)
        tokens += sequence.length
    return batch


def _idle(run: Run, named: dict[str, Any], forward: Callable[[], Any], *, row_ms: float) -> float | None:
    """Write the most expensive kernels of a forward; return the device's idle share."""
    times = 3
    with run.clock.watch() as watched:
        for _ in range(times):
            forward()
    whole = sum(watched.kernels.values()) or 1
    for place, (name, microseconds) in enumerate(watched.kernels.most_common(12), 1):
        run.result(
            "rerank-kernels",
            **named,
            place=place,
            kernel=name,
            count=watched.counts[name] / times,
            ms=microseconds / 1000 / times,
            share=microseconds / whole,
        )
    return None if watched.busy_ms is None else max(0.0, 1 - watched.busy_ms / times / row_ms)


def engine(run: Run) -> None:
    """Write the engine's documents per second for requests that all come at once."""
    model, variant = run.values["model"], run.values["variant"]
    folder = checkpoint(model, run.scratch, run.device)
    started = time.monotonic()
    served = ThreadedDriver(lambda emit: build(settings(folder, model, variant), run.device, emit))
    run.clock.wait()
    run.result("starts", what=f"rerank engine {model}", variant=variant, loaded_s=time.monotonic() - started)
    for name, asked in _loads(run, model).items():
        results: list[Any] = []

        def ask(asked: Sequence[RerankRequest] = asked, results: list[Any] = results) -> None:
            results[:] = served(asked)

        row = {"model": model, "variant": variant, "load": name, "requests": len(asked)}
        with run.isolate("rerank-engine", **row, contender="engine"):
            run.clock.forget_peak()
            seconds, first_s = run.clock.seconds(ask)
            tokens = sum(result.tokens for result in results)
            _documents(run, "engine", row, seconds, first_s, pairs=_pairs(asked), prompt_tokens_per_s=tokens / seconds)
            _served_idle(run, row, partial(served, asked[: max(1, len(asked) // PROFILED_PART)]))
            if run.values.get("keep"):
                scores = json.dumps([result.scores for result in results])
                _kept(run, model, name).write_text(scores, encoding="utf-8")


def padded(run: Run) -> None:
    """Write the documents per second of transformers, and the difference of its scores from the engine's."""
    model = run.values["model"]
    transformers = Padded(checkpoint(model, run.scratch, run.device), run.device, batch=PADDED_BATCH)
    for name, asked in _loads(run, model).items():
        some = asked[: max(1, COMPARED_PAIRS // len(asked[0].documents))]
        found: list[list[float]] = []

        def ask(some: Sequence[RerankRequest] = some, found: list[list[float]] = found) -> None:
            found[:] = transformers(some)

        row = {"model": model, "variant": "padded", "load": name, "requests": len(some)}
        with run.isolate("rerank-engine", **row, contender="transformers"):
            run.clock.forget_peak()
            seconds, first_s = run.clock.seconds(ask)
            apart = _apart(run, model, name, found)
            _documents(run, "transformers", row, seconds, first_s, pairs=_pairs(some), scores_apart=apart)


def _apart(run: Run, model: str, name: str, found: list[list[float]]) -> float | None:
    """Return the largest difference from the engine's scores, or None without them."""
    kept = _kept(run, model, name)
    scores = json.loads(kept.read_text(encoding="utf-8"))[: len(found)] if kept.exists() else []
    apart = [
        abs(one - other)
        for ours, theirs in zip(scores, found, strict=False)
        for one, other in zip(ours, theirs, strict=True)
    ]
    return max(apart, default=None)


def _loads(run: Run, model: str) -> dict[str, list[RerankRequest]]:
    """Draw each load; larger models get a part of it."""
    if run.tiny:
        return {"3 x 4 of 20 tokens": requests(3, 4, (20, 20))}
    part = 1 if model == "0.6B" else 4
    return {name: requests(count // part, documents, words) for name, (count, documents, words) in LOADS.items()}


def _pairs(asked: Sequence[RerankRequest]) -> int:
    return sum(len(request.documents) for request in asked)


def _kept(run: Run, model: str, load: str) -> Path:
    """Return the file of the engine's scores, for the part that compares them."""
    return run.scratch / f"scores of {model}, {load}.json"


def _documents(
    run: Run, contender: str, row: dict[str, Any], seconds: float, first_s: float, *, pairs: int, **others: Any
) -> None:
    run.result(
        "rerank-engine",
        **row,
        contender=contender,
        pairs=pairs,
        seconds=seconds,
        first_s=first_s,
        pairs_per_s=pairs / seconds,
        peak_mb=run.clock.memory()["peak_mb"],
        **others,
    )


def _served_idle(run: Run, row: dict[str, Any], work: Callable[[], Any]) -> None:
    """Write the device's idle share over a part of a load, including the profiler's overhead."""
    with run.clock.watch() as watched:
        work()
    idle = None if watched.busy_ms is None or not watched.span_ms else 1 - watched.busy_ms / watched.span_ms
    run.result("rerank-idle", **row, busy_ms=watched.busy_ms, span_ms=watched.span_ms, idle=idle)
