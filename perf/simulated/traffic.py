"""Loads: when requests arrive, and the requests that they are. Mixes and profiles are files with their sources."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

from genserve_backend.flux.request import PIXELS_PER_TOKEN
from genserve_backend.worker.messages import DEFAULT_LEVEL
from simulated.device import Device

MIXES = Path(__file__).parent / "mixes"
HANDOFF_S = 0.003
"""Seconds from Triton's queue to an engine, also for a request that is alone."""

Weights = tuple[tuple[Any, float], ...]
"""Values and their shares."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request and its time.

    Attributes:
        at: Seconds from the start of the load.
        size: Height and width in pixels.
        steps: Denoising steps.
        level: Priority level, 1 is the most urgent.
        guided: True with a negative prompt, which makes two batch rows.
        loras: Number of adapters.
        scale: Deadline as a multiple of the request's own time; None is none.
    """

    at: float
    size: int
    steps: int
    level: int = DEFAULT_LEVEL
    guided: bool = False
    loras: int = 0
    scale: float | None = None

    @property
    def tokens(self) -> int:
        """Image tokens of one batch row."""
        return self.size * self.size // PIXELS_PER_TOKEN

    @property
    def rows(self) -> int:
        """Batch rows of a forward."""
        return 2 if self.guided else 1

    def own_s(self, device: Device) -> float:
        """Return the request's own time: alone in a server with the device."""
        return HANDOFF_S + device.own_s(rows=self.rows, tokens=self.tokens, steps=self.steps)

    def device_s(self, device: Device) -> float:
        """Return the time for which the request needs the device to itself."""
        return device.busy_s(rows=self.rows, tokens=self.tokens, steps=self.steps)


@dataclass(frozen=True)
class Mix:
    """Shares of the properties of requests.

    Attributes:
        name: Its name in tables.
        source: Origin of the shares.
        sizes: Height and width in pixels.
        steps: Denoising steps.
        levels: Priority levels.
        guided: Share of requests with a negative prompt.
        loras: Numbers of adapters.
        hours: Relative rate by hour of the day; empty if it is constant.
    """

    name: str
    source: str
    sizes: Weights
    steps: Weights
    levels: Weights = ((DEFAULT_LEVEL, 1.0),)
    guided: float = 0.0
    loras: Weights = ((0, 1.0),)
    hours: tuple[float, ...] = ()

    @classmethod
    def load(cls, name: str) -> Mix:
        """Return a mix of `MIXES`.

        Raises:
            ValueError: There is none of this name.
        """
        path = MIXES / f"{name}.json"
        if not path.is_file():
            raise ValueError(f"there is no mix {name!r}; known: {', '.join(mixes())}")
        table = json.loads(path.read_text(encoding="utf-8"))
        weights = {key: tuple(map(tuple, table[key])) for key in ("sizes", "steps", "levels", "loras") if key in table}
        return cls(
            table["name"],
            table["source"],
            guided=table.get("guided", 0.0),
            hours=tuple(table.get("hours", ())),
            **weights,
        )

    def with_steps(self, *steps: int) -> Mix:
        """Return the mix with other steps, in equal shares."""
        return replace(self, steps=tuple((each, 1.0) for each in steps))

    def draw(self, draw: random.Random, at: float, scale: float | None = None) -> Arrival:
        """Return a random request."""
        return Arrival(
            at,
            _one(draw, self.sizes),
            _one(draw, self.steps),
            _one(draw, self.levels),
            self.guided > 0 and draw.random() < self.guided,
            _one(draw, self.loras),
            scale,
        )

    def mean_device_s(self, device: Device) -> float:
        """Return the mean time for which a request of the mix needs the device to itself."""
        parts = [
            (
                weight_size * weight_steps * weight_rows,
                device.busy_s(rows=rows, tokens=size * size // PIXELS_PER_TOKEN, steps=steps),
            )
            for size, weight_size in self.sizes
            for steps, weight_steps in self.steps
            for rows, weight_rows in ((1, 1 - self.guided), (2, self.guided))
        ]
        return sum(weight * seconds for weight, seconds in parts) / sum(weight for weight, _ in parts)


def mixes() -> list[str]:
    """Return the names of all mixes."""
    return sorted(path.stem for path in MIXES.glob("*.json"))


def _one(draw: random.Random, weights: Weights) -> Any:
    if len(weights) == 1:
        return weights[0][0]
    return draw.choices([value for value, _ in weights], [weight for _, weight in weights])[0]


# When requests arrive.


def poisson(rate: float, draw: random.Random, *, hours: Sequence[float] = ()) -> Iterator[float]:
    """Yield the times of a Poisson process.

    Args:
        rate: Requests per second, the mean over the day.
        draw: Random numbers.
        hours: Relative rate by hour of the day.
    """
    peak = max(hours) * len(hours) / sum(hours) if hours else 1.0
    at = 0.0
    while True:
        at += draw.expovariate(rate * peak)
        if not hours or draw.random() < hours[int(at // 3600) % len(hours)] / max(hours):
            yield at


def bursts(
    rate: float, draw: random.Random, *, times: float = 4.0, on_s: float = 20.0, off_s: float = 80.0
) -> Iterator[float]:
    """Yield the times of a Poisson process whose rate switches: a Markov-modulated one with two states.

    Args:
        rate: Requests per second, the mean.
        draw: Random numbers.
        times: Rate of a burst over that between bursts.
        on_s: Mean length of a burst.
        off_s: Mean time between bursts.
    """
    calm = rate * (on_s + off_s) / (times * on_s + off_s)
    at, burst = 0.0, False
    while True:
        end = at + draw.expovariate(1 / (on_s if burst else off_s))
        while (at := at + draw.expovariate(calm * times if burst else calm)) < end:
            yield at
        at, burst = end, not burst


def at_once(count: int) -> Iterator[float]:
    """Yield the time 0, `count` times."""
    yield from (0.0 for _ in range(count))


def draw_load(
    mix: Mix,
    times: Iterator[float],
    draw: random.Random,
    *,
    seconds: float | None = None,
    count: int | None = None,
    scale: float | None = None,
) -> list[Arrival]:
    """Return a load.

    Args:
        mix: The requests.
        times: Their times.
        draw: Random numbers.
        seconds: Length of the load.
        count: Number of requests.
        scale: Deadlines as multiples of own times.
    """
    load = []
    for at in islice(times, count):
        if seconds is not None and at > seconds:
            break
        load.append(mix.draw(draw, at, scale))
    return load


# Public traces, which are not part of the repository.


@dataclass
class TraceError(Exception):
    """A trace that cannot be read; the message is one line."""

    message: str

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Traced:
    """A request of a trace; what it does not say comes from a mix."""

    at: float
    steps: int | None = None
    loras: int = 0
    images: int = 1
    guided: bool = False
    more: dict[str, str] = field(default_factory=dict)


def read_trace(path: Path) -> list[Traced]:
    """Return the requests of a trace, by time from the first one.

    A ``.csv`` file is ``lora_request_trace.csv`` of Alibaba's cluster-trace-v2026-GenAI, a ``.json`` file
    ``diffusion_model_request_trace.json`` of Katz.

    Raises:
        TraceError: It is neither.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file)) if path.suffix == ".csv" else json.load(file)
        parsed = [_gentd26(row) if path.suffix == ".csv" else _katz(row) for row in rows]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise TraceError(f"{path} cannot be read: {type(error).__name__} {error}") from None
    if not parsed:
        raise TraceError(f"{path} cannot be read: it has no requests")
    parsed.sort(key=lambda each: each.at)
    return [replace(each, at=each.at - parsed[0].at) for each in parsed]


def _gentd26(row: dict[str, str]) -> Traced:
    return Traced(
        at=datetime.fromisoformat(row["gmt_create"]).replace(tzinfo=timezone.utc).timestamp(),
        steps=min(100, max(1, int(float(row["num_inference_steps"] or 0)))) if row["num_inference_steps"] else None,
        loras=int(float(row["num_lora"] or 0)),
        images=max(1, int(float(row["num_images_per_prompt"] or 1))),
        guided=bool(float(row["negative_prompt_length"] or 0)),
        more={"kind": row["predict_type"]},
    )


def _katz(row: dict[str, Any]) -> Traced:
    stamp = row["timestamp"]
    at = float(stamp) if not isinstance(stamp, str) else datetime.fromisoformat(stamp).timestamp()
    return Traced(at=at, loras=len(row["loras"] or ()), more={"service": str(row["scene_id"])})


def replay(
    traced: Sequence[Traced], mix: Mix, draw: random.Random, *, rate: float, scale: float | None = None
) -> list[Arrival]:
    """Return a load with the arrivals of a trace, compressed or stretched to a mean rate.

    Steps, adapters and numbers of images are the trace's, everything else is the mix's. A request for several images
    is several requests at once. Negative prompts stay the mix's: FLUX is distilled and rarely needs one.

    Args:
        traced: The trace.
        mix: The rest.
        draw: Random numbers.
        rate: Images per second.
        scale: Deadlines as multiples of own times.
    """
    images = sum(each.images for each in traced)
    stretch = images / rate / max(traced[-1].at, 1.0)
    load = []
    for each in traced:
        for _ in range(each.images):
            drawn = mix.draw(draw, each.at * stretch, scale)
            load.append(replace(drawn, steps=each.steps or drawn.steps, loras=each.loras))
    return load


def window(load: Sequence[Arrival], start: float, seconds: float) -> list[Arrival]:
    """Return the part of a load that begins at `start`, with times from there."""
    return [replace(each, at=each.at - start) for each in load if start <= each.at < start + seconds]
