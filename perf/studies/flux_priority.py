"""Latency of high-priority requests while low-priority requests keep all slots and the queue full.

Prints the ratio of a high-priority request's latency to the time of its own steps in a full batch. With --check it
fails if the mean ratio is above the project's promise.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import COUNT, SETTINGS, fail, judge, show
from compare.flux_load import STEPS
from genserve import Client, GenServeError, Priority
from genserve.serve.options import ServeError
from genserve.serve.own_server import own_server

PROMISE = 1.3
"""Maximum mean ratio."""
SETTLE_S = 5.0
PAUSE_S = 0.5
TIMEOUT_S = 240.0


@dataclass(frozen=True)
class Answer:
    """Times of one image."""

    steps: int
    latency: float
    """Seconds from the call to the response."""
    own: float
    """Seconds from the first step to the encoded image."""


class Crowd:
    """Callers that send one low-priority request after another."""

    def __init__(self, client: Client, callers: int, steps: tuple[int, ...]) -> None:
        self._client = client
        self._steps = steps
        self._end = threading.Event()
        self._pool = ThreadPoolExecutor(callers)
        self.answers: list[Answer] = []
        self._callers = [self._pool.submit(self._call, seed) for seed in range(callers)]

    def _call(self, seed: int) -> None:
        draw = random.Random(seed)
        while not self._end.is_set():
            self.answers.append(ask(self._client, draw.choice(self._steps), "low", f"one of many {seed}"))

    def finish(self) -> None:
        """Wait for the last responses.

        Raises:
            GenServeError: A request failed.
        """
        self._end.set()
        for caller in self._callers:
            caller.result()
        self._pool.shutdown()


def ask(client: Client, steps: int, priority: Priority, prompt: str) -> Answer:
    """Request one image."""
    started = time.monotonic()
    info = client.generate(prompt, steps=steps, priority=priority).info
    return Answer(steps, time.monotonic() - started, info["elapsed_time"] - info["queue_s"])


@click.command(context_settings=SETTINGS)
@click.option("--callers", type=COUNT, default=40, show_default=True, help="Callers with low-priority requests.")
@click.option("--urgent", type=COUNT, default=20, show_default=True, help="High-priority requests.")
@click.option(
    "--steps", type=click.IntRange(1, 100), default=28, show_default=True, help="Steps of a high-priority request."
)
@click.option("--check", is_flag=True, help=f"Fail if the mean ratio is above {PROMISE}.")
def main(callers: int, urgent: int, steps: int, check: bool) -> None:
    """Measure high-priority requests under a saturating low-priority load of mixed and of equal step counts."""
    table = Table()
    for column in (
        "Low-priority load",
        "High, s",
        "Own steps, s",
        "Ratio, mean",
        "worst",
        "Low, completed",
        "Slowest, s",
    ):
        table.add_column(column, justify="right")
    worst = 0.0
    loads = {f"{', '.join(map(str, STEPS))} steps": STEPS, f"{steps} steps each": (steps,)}
    try:
        for name, low_steps in loads.items():
            ratio = measure(table, name, (*low_steps, steps), callers=callers, urgent=urgent, steps=steps)
            worst = max(worst, ratio)
    except (ServeError, GenServeError) as error:
        fail(error)
    show(table)
    broken = [f"a high-priority request takes {worst:.2f} times its own steps, promised {PROMISE}"]
    judge(broken if worst > PROMISE else [], check=check)


def measure(table: Table, name: str, low_steps: tuple[int, ...], *, callers: int, urgent: int, steps: int) -> float:
    """Add a line to the table; return the mean ratio."""
    with (
        tempfile.TemporaryDirectory(prefix="genserve-priority-") as folder,
        own_server(("flux",), log=Path(folder) / "server.log") as addresses,
        Client(addresses["grpc"], timeout=TIMEOUT_S) as client,
    ):
        crowd = Crowd(client, callers, low_steps)
        time.sleep(SETTLE_S)
        high = []
        for index in range(urgent):
            high.append(ask(client, steps, "high", f"urgent {index}"))
            time.sleep(PAUSE_S)
        crowd.finish()
    own = statistics.median(answer.own for answer in crowd.answers if answer.steps == steps)
    mean = statistics.mean(answer.latency for answer in high)
    slowest = max(answer.latency for answer in high)
    table.add_row(
        name,
        f"{mean:.2f}",
        f"{own:.2f}",
        f"{mean / own:.2f}",
        f"{slowest / own:.2f}",
        str(len(crowd.answers)),
        f"{max(answer.latency for answer in crowd.answers):.1f}",
    )
    return mean / own


if __name__ == "__main__":
    main()
