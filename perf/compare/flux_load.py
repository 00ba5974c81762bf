"""Load of the FLUX comparison: requests with mixed step counts, a fixed number of them in flight."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

STEPS = (4, 8, 20, 28)
WARM_UP_SEED = 2**31


@dataclass(frozen=True)
class Request:
    """One image."""

    prompt: str
    steps: int
    seed: int


@dataclass(frozen=True)
class Load:
    """Requests of one run, the same for every contender."""

    requests: tuple[Request, ...]
    concurrency: int
    size: int
    """Height and width in pixels."""

    @classmethod
    def draw(cls, count: int, concurrency: int, size: int, *, seed: int = 0) -> Load:
        """Draw requests with random steps out of `STEPS`."""
        steps = random.Random(seed).choices(STEPS, k=count)
        requests = tuple(Request(f"picture number {index}", each, index) for index, each in enumerate(steps))
        return cls(requests, concurrency, size)

    def to_json(self) -> str:
        """Serialize for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Load:
        """Parse the output of `to_json`."""
        values = json.loads(text)
        return cls(tuple(Request(**each) for each in values.pop("requests")), **values)


@dataclass(frozen=True)
class Timing:
    """Times of one run."""

    seconds: float
    latencies: dict[int, list[float]]
    """Seconds of each request, by steps."""
    mean_batch: float | None = None
    """Mean batch of an image, if the contender reports it."""

    @property
    def count(self) -> int:
        """Return the number of requests."""
        return sum(len(each) for each in self.latencies.values())

    @property
    def images_per_second(self) -> float:
        """Return the rate over the whole run."""
        return self.count / self.seconds

    def mean_latency(self, steps: int | None = None) -> float:
        """Return seconds, of the requests with `steps` steps or of all."""
        chosen = self.latencies[steps] if steps else [value for each in self.latencies.values() for value in each]
        return statistics.mean(chosen)

    def to_json(self) -> str:
        """Serialize for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Timing:
        """Parse the output of `to_json`."""
        values = json.loads(text)
        latencies = {int(steps): each for steps, each in values["latencies"].items()}
        return cls(values["seconds"], latencies, values["mean_batch"])


def drive(call: Callable[[Request], object], load: Load) -> Timing:
    """Send all requests with `concurrency` of them in flight, after a warm-up of `concurrency` requests."""
    with ThreadPoolExecutor(load.concurrency) as callers:
        list(
            callers.map(
                call, (replace(each, seed=WARM_UP_SEED + each.seed) for each in load.requests[: load.concurrency])
            )
        )
    latencies: dict[int, list[float]] = {}

    def one(request: Request) -> None:
        started = time.monotonic()
        call(request)
        latencies.setdefault(request.steps, []).append(time.monotonic() - started)

    started = time.monotonic()
    with ThreadPoolExecutor(load.concurrency) as callers:
        list(callers.map(one, load.requests))
    return Timing(time.monotonic() - started, latencies)
