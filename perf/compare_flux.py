"""GenServe's FLUX, through Triton, against the usual ways to serve FluxPipeline, under the same load in the same run.

Prints ratios: absolute times mean little on a machine that does other things too. With --check it fails when one is
below what the project promises.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import click
from rich.console import Console
from rich.table import Table

from flux_load import STEPS, Load, Request, Timing, drive
from genserve import Client, GenServeError
from genserve.serve.options import ServeError
from own_process import TIMEOUT_S, last_line
from perf_server import own_server

HERE = Path(__file__).parent
CHECKPOINT = HERE.parent / "demo" / "flux"
OURS = "genserve"
ROWS = {
    OURS: "GenServe, through Triton (gRPC)",
    "engine": "GenServe's engines, without Triton",
    "lock": "(a) FluxPipeline behind a global lock",
    "pool": "(b) a pool of pipelines, one thread each",
    "static": "(c) static batches of equal settings",
    "fleet": "(c) in a process for each CPU",
}
PROMISES = {"lock": 1.8, "pool": 1.8, "static": 1.2, "engine": 0.95}
"""Images per second of ours, at least so many times the other's."""
FASTEST = min(STEPS)
LATENCY_PROMISE = 1 / 3
"""Mean latency of the requests with the fewest steps, at most so many times that of static batches."""


@dataclass
class Result:
    """The runs of one contender."""

    timings: list[Timing] = field(default_factory=list)
    mean_batch: list[float] = field(default_factory=list)

    @property
    def images_per_second(self) -> float:
        """The median of the runs."""
        return statistics.median(timing.images_per_second for timing in self.timings)

    def latency(self, steps: int | None = None) -> float:
        """The median over the runs of the mean latency, in seconds."""
        return statistics.median(timing.mean_latency(steps) for timing in self.timings)


@contextmanager
def serving(checkpoint: Path, log: Path) -> Iterator[Client]:
    """A server of its own: like the pool of pipelines, it gets an instance with one thread for each CPU."""
    environment = {"FLUX_WORKERS": str(os.cpu_count() or 1), "OMP_NUM_THREADS": "1", "FLUX_MODEL_PATH": str(checkpoint)}
    with (
        own_server(("flux",), log=log, environment=environment) as addresses,
        Client(addresses["grpc"], timeout=TIMEOUT_S) as client,
    ):
        yield client


def run_ours(checkpoint: Path, load: Load, log: Path) -> tuple[Timing, float]:
    """Through Triton; the timing and the mean size of an image's batches."""
    sizes: list[float] = []

    def call(request: Request) -> None:
        made = client.generate(
            request.prompt, steps=request.steps, seed=request.seed, height=load.size, width=load.size
        )
        sizes.append(made.info["mean_batch_size"])

    with serving(checkpoint, log) as client:
        timing = drive(call, load)
    return timing, statistics.mean(sizes[load.concurrency :])  # less the warm-up


def run_contender(name: str, checkpoint: Path, load_file: Path) -> Timing:
    """In a process of its own."""
    return Timing.from_json(last_line(HERE / "flux_contenders.py", name, str(checkpoint), str(load_file)))


def table(results: dict[str, Result]) -> Table:
    """One row for each contender."""
    drawn = Table()
    drawn.add_column("")
    headings = ("Images/s", "Ours is", f"{FASTEST} steps, s", "Ours takes", "All, s", "Mean batch")
    for heading in headings:
        drawn.add_column(heading, justify="right")
    ours = results[OURS]
    for name, result in results.items():
        drawn.add_row(
            ROWS[name],
            f"{result.images_per_second:.1f}",
            "" if name == OURS else f"{ours.images_per_second / result.images_per_second:.2f} x",
            f"{result.latency(FASTEST):.2f}",
            "" if name == OURS else f"{ours.latency(FASTEST) / result.latency(FASTEST):.2f} x",
            f"{result.latency():.2f}",
            f"{statistics.median(result.mean_batch):.1f}" if result.mean_batch else "",
        )
    return drawn


def broken_promises(results: dict[str, Result]) -> list[str]:
    """What is not as the project says."""
    ours = results[OURS]
    broken = [
        f"{ours.images_per_second / results[name].images_per_second:.2f} times {ROWS[name]}, promised {least}"
        for name, least in PROMISES.items()
        if name in results and ours.images_per_second < least * results[name].images_per_second
    ]
    if "static" in results and ours.latency(FASTEST) > LATENCY_PROMISE * results["static"].latency(FASTEST):
        broken.append(f"a {FASTEST}-step request takes more than {LATENCY_PROMISE:.2f} of its time in static batches")
    return broken


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--requests", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--concurrency", type=click.IntRange(min=1), default=16, show_default=True, help="Requests in flight.")
@click.option("--size", type=click.IntRange(min=64), default=128, show_default=True, help="Height and width, pixels.")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each; medians count."
)
@click.option("--only", multiple=True, type=click.Choice([name for name in ROWS if name != OURS]), help="Less to do.")
@click.option("--flux", "checkpoint", type=click.Path(path_type=Path), default=CHECKPOINT, help="The checkpoint.")
@click.option("--check", is_flag=True, help="Fail when a ratio is below what is promised.")
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
    names = [name for name in ROWS if name == OURS or not only or name in only]
    results = {name: Result() for name in names}
    try:
        with tempfile.TemporaryDirectory(prefix="genserve-compare-") as folder:
            load_file = Path(folder) / "load.json"
            load_file.write_text(load.to_json(), encoding="utf-8")
            for repeat in range(repeats):
                for name, result in results.items():
                    click.echo(f"run {repeat + 1} of {repeats}: {ROWS[name]}", err=True)
                    if name == OURS:
                        timing, mean_batch = run_ours(checkpoint.resolve(), load, Path(folder) / "server.log")
                        result.mean_batch.append(mean_batch)
                    else:
                        timing = run_contender(name, checkpoint, load_file)
                    result.timings.append(timing)
    except (ServeError, GenServeError, subprocess.TimeoutExpired) as error:
        _fail(str(error))
    console = Console()
    console.width = max(console.width, 120)
    console.print(f"{requests} requests of {', '.join(map(str, STEPS))} steps, {size} px, {concurrency} in flight")
    console.print(table(results))
    for line in (broken := broken_promises(results)):
        click.echo(line, err=True)
    if check and broken:
        sys.exit(1)


def _fail(message: str) -> NoReturn:
    click.echo(f"compare_flux: {' '.join(message.split())}", err=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
