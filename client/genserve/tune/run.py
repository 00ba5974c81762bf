"""Tuning of one model: its servers, its machine and its search together."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from genserve.serve.device_memory import find_gpus
from genserve.serve.flux_memory import has_int8
from genserve.tune.bench import Bench
from genserve.tune.interrupts import Interrupts
from genserve.tune.load import TOKENS_PER_WORD, Load, Objective, TrialFailed
from genserve.tune.search import Outcome, Search, TuneError
from genserve.tune.space import Demand, Machine, Space, set_values, tuned
from genserve.tune.start import THREADS_VARIABLE, Start, variables
from genserve.types import InstanceLoad
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.request import PIXELS_PER_TOKEN

BLOCKS = 120
"""Blocks that the budget has room for, if it had to pay for nothing else."""
BLOCK_S = 1.5, 15.0
"""Shortest and longest block, in seconds. A block has two rounds of requests, however long they take."""
CPU_COMPILERS = ("g++", "c++", "clang++")
GPU_COMPILERS = ("gcc", "cc", "clang")
"""Compilers of what torch.compile writes, by device: Triton's language has one of its own, and needs one in C."""


@dataclass(frozen=True)
class Goal:
    """Direction and limits of the search.

    Attributes:
        objective: ``throughput`` or ``latency``.
        percent: Percentile of the latency.
        margin: Gain below which a change is not worth it.
        lossy: Try settings that change images or scores a little.
    """

    objective: Objective
    percent: float
    margin: float
    lossy: bool


@dataclass(frozen=True)
class Result:
    """Result for one model.

    Attributes:
        load: The load.
        outcome: The search.
        devices: Names of the devices.
    """

    load: Load
    outcome: Outcome
    devices: tuple[str, ...]


def tune_model(
    load: Load,
    start: Start,
    goal: Goal,
    *,
    options: Sequence[str],
    deadline: float,
    interrupts: Interrupts,
    say: Callable[[str], None],
) -> Result:
    """Search for settings of one model. All servers have stopped at the end.

    Args:
        load: The load.
        start: The configuration in force.
        goal: The objective.
        options: Options of `genserve serve` for the trials.
        deadline: Time of `time.monotonic` at which the search has to have ended. The length of a block follows from it.
        interrupts: Signals.
        say: Called with a line of progress.

    Raises:
        TuneError: The configuration in force cannot be measured.
        ServeError: Its settings are not usable.
    """
    model = load.model
    names = tuned(model, lossy=goal.lossy)
    before = set_values(model, start.environment, lossy=goal.lossy)
    settings = start.settings(model, before, names)
    with tempfile.TemporaryDirectory(prefix="genserve-tune-") as folder:
        bench = Bench(
            load,
            environment={**dict.fromkeys(variables(model), ""), **start.environment},
            variables=names,
            options=options,
            log=Path(folder) / "server.log",
            interrupts=interrupts,
        )
        try:
            say(f"{model}: starting a server with the settings in force")
            try:
                block_s = min(max(BLOCK_S[0], (deadline - time.monotonic()) / BLOCKS), BLOCK_S[1])
                bench.calibrate(before, block_s=block_s, deadline=deadline)
            except TrialFailed as error:
                raise TuneError(f"{model}: the settings in force cannot be measured: {error}") from None
            space = Space(
                model,
                lambda values: start.settings(model, values, names),
                look_at(bench.instances, start, dtypes=goal.lossy),
                demand_of(load, FluxCheckpoint.load(settings.model_path).native_size if model == "flux" else 0),
                before=before,
                lossy=goal.lossy,
            )
            search = Search(
                bench,
                space.changes,
                objective=goal.objective,
                percent=goal.percent,
                deadline=deadline,
                margin=goal.margin,
                say=lambda line: say(f"{model}: {line}"),
            )
            outcome = search.run(before)
        finally:
            bench.close()
    return Result(load, outcome, tuple(dict.fromkeys(each.device for each in bench.instances)))


def look_at(instances: Sequence[InstanceLoad], start: Start, *, dtypes: bool) -> Machine:
    """Return the machine, by the instances of a server that runs on it.

    Args:
        instances: The instances.
        start: The configuration in force.
        dtypes: Find out which dtypes the devices have, which imports torch.
    """
    device = instances[0].device if instances else "cpu"
    # Threads of one core share its arithmetic: more workers than cores gain nothing.
    cores = min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1)
    given = start.environment.get(THREADS_VARIABLE, "").partition(",")[0]
    used = [each.memory_used for each in instances if each.memory_used]
    gpus = {gpu.name: gpu for gpu in find_gpus()} if dtypes and device != "cpu" else {}
    return Machine(
        device=device,
        cores=cores,
        default_threads=int(given) if given.isdecimal() else cores,
        instance_bytes=max(used, default=None),
        total_bytes=instances[0].memory_total if instances else None,
        capability=gpus[device].capability if device in gpus else None,
        has_int8=dtypes and has_int8(device),
        has_compiler=any(shutil.which(name) for name in (CPU_COMPILERS if device == "cpu" else GPU_COMPILERS)),
    )


def demand_of(load: Load, native_size: int) -> Demand:
    """Return the most that a load can have in flight, by a look at its first requests.

    Args:
        load: The load.
        native_size: Side of an image in pixels if the request does not say so.
    """
    first = load.block(0, load.in_flight)
    if load.model == "rerank":
        items = sum(len(each["documents"]) for each in first)
        words = sum(len(text.split()) for each in first for text in each["documents"])
        tokens, sizes = math.ceil(words * TOKENS_PER_WORD), 1
    else:
        shapes = [(each.get("height") or native_size, each.get("width") or native_size) for each in first]
        rows = [2 if each.get("negative_prompt") else 1 for each in first]
        items = len(first)
        tokens = sum(
            height * width // PIXELS_PER_TOKEN * count for (height, width), count in zip(shapes, rows, strict=True)
        )
        sizes = len(set(shapes))
    if load.rate:
        return Demand(None, None, None, sizes)
    return Demand(load.in_flight, items, tokens, sizes)
