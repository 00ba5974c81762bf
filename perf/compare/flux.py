"""GenServe's FLUX, through Triton, against the usual ways to serve FluxPipeline.

All get the same load in the same run. Prints ratios: absolute times depend on the machine and on other processes. With
--check it fails if a ratio is below the project's promise.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import click
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from common.command import COUNT, FLUX_CHECKPOINT, SETTINGS, fail, judge, new_table, run_in_turn, show
from common.script import TIMEOUT_S, run_script
from compare.flux_load import STEPS, Load, Request, Timing, drive
from genserve import Client, GenServeError
from genserve.serve.options import ServeError
from genserve.serve.own_server import own_server

HERE = Path(__file__).parent
OURS = "genserve"
TITLES = {
    OURS: "GenServe, through Triton (gRPC)",
    "engine": "GenServe's engines, without Triton",
    "lock": "(a) FluxPipeline behind a global lock",
    "pool": "(b) a pool of pipelines, one thread each",
    "static": "(c) static batches of equal settings",
    "fleet": "(c) in a process for each CPU",
}
PROMISES = {"lock": 1.8, "pool": 1.8, "static": 1.2, "engine": 0.95}
"""Minimum ratio of our images per second to the contender's."""
FASTEST = min(STEPS)
LATENCY_PROMISE = 1 / 3
"""Maximum ratio of our mean latency to that of static batches, for requests with the fewest steps."""


@dataclass
class Result:
    """The runs of one contender."""

    timings: list[Timing]

    @property
    def images_per_second(self) -> float:
        """Return the median of the runs."""
        return statistics.median(timing.images_per_second for timing in self.timings)

    def latency(self, steps: int | None = None) -> float:
        """Return the median of the runs' mean latency, in seconds."""
        return statistics.median(timing.mean_latency(steps) for timing in self.timings)

    @property
    def mean_batch(self) -> float | None:
        """Return the median of the runs' mean batch, if the contender reports batches."""
        sizes = [timing.mean_batch for timing in self.timings if timing.mean_batch is not None]
        return statistics.median(sizes) if sizes else None


@contextmanager
def serving(checkpoint: Path, log: Path) -> Iterator[Client]:
    """Serve one instance with one thread per CPU, like the pool of pipelines."""
    environment = {"FLUX_WORKERS": str(os.cpu_count() or 1), "OMP_NUM_THREADS": "1", "FLUX_MODEL_PATH": str(checkpoint)}
    with (
        own_server(("flux",), log=log, environment=environment) as addresses,
        Client(addresses["grpc"], timeout=TIMEOUT_S) as client,
    ):
        yield client


def run_ours(checkpoint: Path, load: Load, log: Path) -> Timing:
    """Drive GenServe through Triton."""
    sizes: list[float] = []

    def call(request: Request) -> None:
        made = client.generate(
            request.prompt, steps=request.steps, seed=request.seed, height=load.size, width=load.size
        )
        sizes.append(made.info["mean_batch_size"])

    with serving(checkpoint, log) as client:
        timing = drive(call, load)
    return replace(timing, mean_batch=statistics.mean(sizes[load.concurrency :]))  # without the warm-up


def run_contender(name: str, checkpoint: Path, load_file: Path) -> Timing:
    """Drive a contender in a process of its own."""
    return Timing.from_json(run_script(HERE / "flux_contenders.py", name, str(checkpoint), str(load_file)))


def table(results: dict[str, Result]) -> Table:
    """Return a table with one line per contender."""
    drawn = new_table("", "Images/s", "Ours is", f"{FASTEST} steps, s", "Ours takes", "All, s", "Mean batch")
    ours = results[OURS]
    for name, result in results.items():
        drawn.add_row(
            TITLES[name],
            f"{result.images_per_second:.1f}",
            "" if name == OURS else f"{ours.images_per_second / result.images_per_second:.2f} x",
            f"{result.latency(FASTEST):.2f}",
            "" if name == OURS else f"{ours.latency(FASTEST) / result.latency(FASTEST):.2f} x",
            f"{result.latency():.2f}",
            f"{result.mean_batch:.1f}" if result.mean_batch else "",
        )
    return drawn


def broken_promises(results: dict[str, Result]) -> list[str]:
    """Return a line for each promise that does not hold."""
    ours = results[OURS]
    broken = [
        f"{ours.images_per_second / results[name].images_per_second:.2f} times {TITLES[name]}, promised {least}"
        for name, least in PROMISES.items()
        if name in results and ours.images_per_second < least * results[name].images_per_second
    ]
    if "static" in results and ours.latency(FASTEST) > LATENCY_PROMISE * results["static"].latency(FASTEST):
        broken.append(
            f"a {FASTEST}-step request takes more than {LATENCY_PROMISE:.2f} times its latency in static batches"
        )
    return broken


@click.command(context_settings=SETTINGS)
@click.option("--requests", type=COUNT, default=64, show_default=True)
@click.option("--concurrency", type=COUNT, default=16, show_default=True, help="Requests in flight.")
@click.option("--size", type=click.IntRange(min=64), default=128, show_default=True, help="Height and width, pixels.")
@click.option("--repeats", type=COUNT, default=3, show_default=True, help="Runs of each contender; medians count.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([name for name in TITLES if name != OURS]),
    help="Contenders. [default: all]",
)
@click.option("--flux", "checkpoint", type=click.Path(path_type=Path), default=FLUX_CHECKPOINT, help="Checkpoint.")
@click.option("--check", is_flag=True, help="Fail if a ratio is below its promise.")
def main(
    requests: int,
    concurrency: int,
    size: int,
    repeats: int,
    only: tuple[str, ...],
    checkpoint: Path,
    check: bool,
) -> None:
    """Compare GenServe with a global lock, a pool of pipelines, and static batches."""
    load = Load.draw(requests, concurrency, size)
    if FASTEST not in {request.steps for request in load.requests}:
        raise click.BadParameter(f"{requests} requests have none of {FASTEST} steps", param_hint="--requests")
    names = [name for name in TITLES if name == OURS or not only or name in only]
    try:
        with tempfile.TemporaryDirectory(prefix="genserve-compare-") as folder:
            load_file = Path(folder) / "load.json"
            load_file.write_text(load.to_json(), encoding="utf-8")
            runs: dict[str, Callable[[], Timing]] = {
                TITLES[name]: partial(run_ours, checkpoint.resolve(), load, Path(folder) / "server.log")
                if name == OURS
                else partial(run_contender, name, checkpoint, load_file)
                for name in names
            }
            timings = run_in_turn(runs, repeats)
    except (ServeError, GenServeError, subprocess.TimeoutExpired) as error:
        fail(error)
    results = {name: Result(timings[TITLES[name]]) for name in names}
    steps = ", ".join(map(str, STEPS))
    show(table(results), f"{requests} requests of {steps} steps, {size} px, {concurrency} in flight")
    judge(broken_promises(results), check=check)


if __name__ == "__main__":
    main()
