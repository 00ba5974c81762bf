"""Load of a trial: requests, the same ones for both servers of a pair, and their measurement."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from genserve.aio import AsyncClient
from genserve.errors import GenServeError
from genserve.map_files import FileProblem, parse_tasks
from genserve.together import together

Arguments = Mapping[str, Any]
Objective = Literal["throughput", "latency"]

UNITS = {"flux": "images", "rerank": "documents"}
"""Units of the throughput, by model."""
MARKS = {"flux": "prompt", "rerank": "query"}
"""Argument by which a task in a file names its model."""
TOKENS_PER_WORD = 1.5
TEXT = (
    "river mountain window letter garden market winter engine paper silver harbor forest kitchen music doctor bridge "
    "history science village summer station picture morning country teacher weather ocean family island light company "
    "language animal building problem machine system question energy water planet method reason building number sound"
)
WORDS = TEXT.split()
"""Common words, which most tokenizers know as one token each."""
COLORS = ("red", "blue", "green", "yellow", "orange", "purple", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "house", "tree", "boat", "cat")


class TrialFailed(Exception):
    """A server that does not start, or does not answer the load; the message is one line."""


@dataclass(frozen=True)
class Load:
    """Requests of all blocks for one model.

    Attributes:
        model: ``flux`` or ``rerank``.
        request: Returns the arguments of the request with a number, from 0.
        in_flight: Requests in flight.
        rate: Requests per second, at random times; None sends the next request after each answer.
        description: The load in words.
    """

    model: str
    request: Callable[[int], Arguments]
    in_flight: int
    rate: float | None
    description: str

    def block(self, number: int, count: int) -> list[Arguments]:
        """Return the requests of a block; no two blocks share one, unless they come from a file."""
        return [self.request(number * count + index) for index in range(count)]


@dataclass(frozen=True)
class Sample:
    """Measurement of one block.

    Attributes:
        seconds: Time of the whole block.
        units: Images, or documents, that were made in it.
        latencies: Seconds of each request.
    """

    seconds: float
    units: int
    latencies: tuple[float, ...]

    @property
    def rate(self) -> float:
        """Images, or documents, per second."""
        return self.units / self.seconds

    def percentile(self, percent: float) -> float:
        """Return a percentile of the latencies in seconds."""
        return float(np.percentile(self.latencies, percent))


def image_load(
    *, in_flight: int, sizes: Sequence[tuple[int, int]], steps: int | None, rate: float | None = None
) -> Load:
    """Return a load of images with drawn prompts.

    Args:
        in_flight: Requests in flight.
        sizes: Widths and heights in pixels, in turn; none selects the checkpoint's.
        steps: Denoising steps; None selects the checkpoint's.
        rate: Requests per second, see `Load`.
    """

    def request(number: int) -> Arguments:
        rng = random.Random(number)  # noqa: S311  # a load, not a secret
        arguments: dict[str, Any] = {
            "prompt": f"a {rng.choice(COLORS)} {rng.choice(SHAPES)} and a {rng.choice(WORDS)}, {number}",
            "seed": number,
        }
        if sizes:
            arguments["width"], arguments["height"] = sizes[number % len(sizes)]
        return arguments if steps is None else {**arguments, "steps": steps}

    size = ", ".join(f"{width}x{height}" for width, height in sizes) or "the checkpoint's size"
    count = f"{steps} steps" if steps else "the checkpoint's steps"
    return Load("flux", request, in_flight, rate, f"images of {size}, {count}, {_arrivals(in_flight, rate)}")


def rerank_load(*, in_flight: int, documents: int, length: int, rate: float | None = None) -> Load:
    """Return a load of queries with drawn documents.

    Args:
        in_flight: Requests in flight.
        documents: Documents of each request.
        length: Mean words of a document; they have from half to one and a half of it.
        rate: Requests per second, see `Load`.
    """

    def request(number: int) -> Arguments:
        rng = random.Random(number)  # noqa: S311  # a load, not a secret
        lengths = (rng.randint(max(1, length // 2), length + length // 2) for _ in range(documents))
        return {
            "query": " ".join(rng.choices(WORDS, k=8)),
            "documents": [" ".join(rng.choices(WORDS, k=each)) for each in lengths],
        }

    words = f"{documents} documents of about {length} words"
    return Load("rerank", request, in_flight, rate, f"{words}, {_arrivals(in_flight, rate)}")


def file_load(path: Path, model: str, *, in_flight: int, rate: float | None = None) -> Load | None:
    """Return the load of one model's tasks in a file of `genserve map`, in turn; None if there are none.

    Raises:
        FileProblem: The file cannot be read, or a line of it is unusable.
    """
    tasks = []
    try:
        with path.open("rb") as lines:
            for task in parse_tasks(lines):
                if task.problem:
                    raise FileProblem(f"{path}: {task.problem}")
                if MARKS[model] in task.arguments:
                    # Its id belongs to one request, and a load repeats it.
                    tasks.append({name: value for name, value in task.arguments.items() if name != "task_id"})
    except OSError as error:
        raise FileProblem(f"cannot read {path}: {error.strerror}") from None
    if not tasks:
        return None
    return Load(
        model,
        lambda number: tasks[number % len(tasks)],
        in_flight,
        rate,
        f"{len(tasks)} tasks of {path.name}, {_arrivals(in_flight, rate)}",
    )


def _arrivals(in_flight: int, rate: float | None) -> str:
    return f"{rate:g} requests per second" if rate else f"{in_flight} requests in flight"


def units_of(model: str, arguments: Arguments) -> int:
    """Return the images, or documents, of a request."""
    return len(arguments["documents"]) if model == "rerank" else 1


async def drive(client: AsyncClient, load: Load, requests: Sequence[Arguments], *, limit_s: float) -> Sample:
    """Send requests to a server and measure them.

    At the limit, the block ends with what has been answered; requests that have not count with their age.

    Args:
        client: Client of the server; its timeout is above the limit.
        load: Decides how the requests follow each other.
        requests: The block's requests.
        limit_s: Time limit of the block, in seconds.

    Raises:
        TrialFailed: A request failed, or none was answered before the limit.
    """
    run = _Run(load, limit_s)
    work = asyncio.ensure_future(run.paced(client, requests) if load.rate else run.closed(client, requests))
    try:
        await asyncio.wait({work}, timeout=limit_s)
        ended = work.done()
    finally:
        work.cancel()
        await asyncio.wait({work})
    if ended and not work.cancelled() and (error := work.exception()):
        if isinstance(error, GenServeError):
            raise TrialFailed(" ".join(f"{type(error).__name__}: {error}".split())) from None
        raise error
    return run.sample()


class _Run:
    """One block while it runs."""

    def __init__(self, load: Load, limit_s: float) -> None:
        self._load = load
        self._limit_s = limit_s
        self._started = time.monotonic()
        self._ended = self._started
        self._units = 0
        self._latencies: list[float] = []
        self._open: dict[int, float] = {}

    async def closed(self, client: AsyncClient, requests: Sequence[Arguments]) -> None:
        """Send each request when an earlier one has been answered."""
        waiting = iter(enumerate(requests))
        await together(*(self._caller(client, waiting) for _ in range(min(self._load.in_flight, len(requests)))))

    async def paced(self, client: AsyncClient, requests: Sequence[Arguments]) -> None:
        """Send the requests at random times, whatever has been answered."""
        rng = random.Random(len(requests))  # noqa: S311  # a load, not a secret
        at = 0.0
        calls = []
        for number, arguments in enumerate(requests):
            at += rng.expovariate(self._load.rate or 1.0)
            calls.append(self._later(client, at, number, arguments))
        await together(*calls)

    async def _caller(self, client: AsyncClient, waiting: Iterator[tuple[int, Arguments]]) -> None:
        for number, arguments in waiting:
            await self._send(client, number, arguments)

    async def _later(self, client: AsyncClient, at: float, number: int, arguments: Arguments) -> None:
        await asyncio.sleep(at)
        await self._send(client, number, arguments)

    async def _send(self, client: AsyncClient, number: int, arguments: Arguments) -> None:
        started = self._open[number] = time.monotonic()
        await (client.generate(**arguments) if self._load.model == "flux" else client.rerank(**arguments))
        self._ended = time.monotonic()
        del self._open[number]
        self._latencies.append(self._ended - started)
        self._units += units_of(self._load.model, arguments)

    def sample(self) -> Sample:
        """Return the measurement."""
        if not self._latencies:
            raise TrialFailed(f"no answer within {self._limit_s:.0f} s")
        now = time.monotonic()
        ages = [now - started for started in self._open.values()]
        ended = now if ages else self._ended
        return Sample(ended - self._started, self._units, (*self._latencies, *ages))
