"""The lines where the host waits for the device, the memory that engines take, and scores alone and batched."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch

from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.load import build as build_flux
from genserve_backend.flux.request import parse
from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.load import build as build_rerank
from genserve_backend.rerank.scorers import load_scorer
from genserve_backend.settings import FluxSettings
from gpu.driver import Turned
from gpu.flux_models import DEMO
from gpu.part import Run
from gpu.rerank import settings as rerank_settings
from gpu.rerank_models import checkpoint, requests

TURNS = 3


def _flux(run: Run) -> Turned:
    settings = FluxSettings.model_validate({"model_path": DEMO, "dtype": "bfloat16", "max_padding": 10.0})
    return Turned(lambda emit: build_flux(settings, run.device, emit))


def _pictures(count: int, steps: int) -> list[Any]:
    known = FluxCheckpoint.read(DEMO)
    sizes = (128, 112)
    return [
        parse(
            {"PROMPT": f"picture {seed}", "SEED": seed, "STEPS": steps, "WIDTH": sizes[seed % 2]},
            known,
            max_pixels=2**20,
        )
        for seed in range(count)
    ]


def waits_and_memory(run: Run) -> None:
    """Write where the host waits, and then the memory of several waves of requests."""
    with run.trying("waits", what="all"):
        waits(run)
    memory(run)


def waits(run: Run) -> None:
    """Write where the host waits for the device in three steps, at their start and end, and in three forwards."""
    engine = _flux(run)
    engine.finish(engine.submit(_pictures(2, 2)))  # what is made ready only once
    jobs: list[int] = []

    def begin() -> None:
        jobs.extend(engine.submit(_pictures(4, TURNS + 3)))
        engine.turn()

    def step() -> None:
        for _ in range(TURNS):
            engine.turn()

    _waits(run, "FLUX: four images come", begin)
    engine.turn()
    _waits(run, f"FLUX: {TURNS} steps", step)
    _waits(run, "FLUX: the last step, and decoding", lambda: engine.finish(jobs))
    folder = checkpoint("tiny", run.scratch, run.device)
    reranker = Turned(lambda emit: build_rerank(rerank_settings(folder, "tiny", "eager"), run.device, emit))
    reranker.finish(reranker.submit(requests(1, 4, (20, 20))))
    _waits(run, "rerank: a request with a new query", lambda: _ask(reranker, 1))
    _waits(run, f"rerank: {TURNS} forwards", lambda: _ask(reranker, TURNS))


def _ask(reranker: Turned, times: int) -> None:
    for number in range(times):
        reranker.finish(reranker.submit(requests(number + 2, 4, (20, 60))[-1:]))


def _waits(run: Run, what: str, call: Callable[[], Any]) -> None:
    with run.trying("waits", what=what):
        found = run.clock.waits(call)
        if found is None:
            run.result("waits", what=what, count=None, ours=None, line=None)
            return
        run.result("waits", what=what, count=sum(found.values()), ours="all", line="")
        for (ours, line), count in found.most_common():
            run.result("waits", what=what, count=count, ours=ours, line=line)


def memory(run: Run) -> None:
    """Write the device's memory before, at the peak of and after several waves of requests: it should not grow."""
    waves = 2 if run.tiny else 5
    count = 2 if run.tiny else 16
    _memory(run, "start")
    engine = _flux(run)
    _memory(run, "FLUX loaded")
    for wave in range(waves):
        run.clock.forget_peak()
        engine.finish(engine.submit(_pictures(count, 2 if run.tiny else 8)))
        _memory(run, f"FLUX, wave {wave + 1}")
    folder = checkpoint("tiny", run.scratch, run.device)
    reranker = Turned(lambda emit: build_rerank(rerank_settings(folder, "tiny", "eager"), run.device, emit))
    _memory(run, "reranker loaded")
    for wave in range(waves):
        run.clock.forget_peak()
        reranker.finish(reranker.submit(requests(count, 5, (20, 60 if run.tiny else 500))))
        _memory(run, f"rerank, wave {wave + 1}")


def _memory(run: Run, what: str) -> None:
    run.clock.wait()
    run.result("memory", what=what, **run.clock.memory())


def scores(run: Run) -> None:
    """Write how far a document's score is apart alone and batched, and with and without a shared prefix."""
    model = "tiny" if run.tiny else "0.6B"
    folder = checkpoint(model, run.scratch, run.device)
    (asked,) = requests(1, 8 if run.tiny else 64, (20, 60 if run.tiny else 400))
    found: dict[str, torch.Tensor] = {}
    for prefix in (True, False):
        chosen = rerank_settings(folder, model, "eager", **({} if prefix else {"prefix_cache_bytes": 0}))
        scorer = load_scorer(RerankCheckpoint.read(folder), chosen, run.device)
        sequences = list(chain.from_iterable(each.sequences for each in scorer.read(asked)))
        name = "shared prefix" if prefix else "no prefix"
        crowd = scorer.scores(scorer.forward(sequences))
        order = random.Random(0).sample(range(len(sequences)), len(sequences))  # noqa: S311
        mixed = torch.empty_like(crowd)
        mixed[order] = scorer.scores(scorer.forward([sequences[index] for index in order]))
        alone = torch.cat([scorer.scores(scorer.forward([sequence])) for sequence in sequences])
        _apart(run, f"{name}: alone", f"{name}: batched", alone, crowd)
        _apart(run, f"{name}: batched", f"{name}: in another order", crowd, mixed)
        _apart(run, f"{name}: batched", f"{name}: again", crowd, scorer.scores(scorer.forward(sequences)))
        found[name] = crowd
    _apart(run, "shared prefix: batched", "no prefix: batched", *found.values())


def _apart(run: Run, one: str, other: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    apart = (ours - theirs).abs()
    run.result(
        "scores",
        one=one,
        other=other,
        documents=len(apart),
        greatest=float(apart.max()),
        identical=float((apart == 0).float().mean()),
        spread=float(ours.max() - ours.min()),
    )
