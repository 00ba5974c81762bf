"""Messages between an instance and its worker process, over one private socket pair.

Both ends run the same code on the same machine, and the socket is inherited, never named: pickling is safe. Nothing
that a client sent is unpickled; a request travels as plain strings and numbers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from genserve_backend.errors import RequestError
from genserve_backend.settings import ModelSettings
from genserve_backend.worker.metrics import Counter, Gauge, Histogram

LEVELS = (1, 2, 3)
"""Priority levels, numbered as in Triton: 1 is the most urgent."""
DEFAULT_LEVEL = 2
"""Priority level of a request that names none."""


@dataclass(frozen=True)
class Start:
    """First message to a worker: the engine to build, its settings and its device."""

    engine: str
    """``package.module:factory``; the factory takes (settings, device, emit) and returns a `worker.engine.Engine`."""
    settings: ModelSettings
    device: str
    instance: str


@dataclass(frozen=True)
class Submit:
    """A request to run."""

    job_id: int
    task_id: str
    request: Any
    deadline: float
    """On the clock of time.monotonic(), which all processes of a machine share on Linux."""
    level: int = DEFAULT_LEVEL
    """Priority level, see `LEVELS`."""
    arrived: float = field(default_factory=time.monotonic)
    """Arrival at the instance, on the same clock as `deadline`; a request that runs again keeps it."""
    has_own_deadline: bool = False
    """True if the caller asked for a shorter time than the server's limit."""


@dataclass(frozen=True)
class Cancel:
    """A job to stop; the worker still answers it, with Failed(Cancelled)."""

    job_id: int


@dataclass(frozen=True)
class Ready:
    """The worker has loaded its model."""


@dataclass(frozen=True)
class NotReady:
    """The worker cannot load its model, and has exited."""

    reason: str


@dataclass(frozen=True)
class Grant:
    """The engine can accept `count` more requests."""

    count: int


@dataclass(frozen=True)
class Heartbeat:
    """Sign of life from the thread that owns the device, with the metrics since the last one."""

    gauges: Mapping[Gauge, float] = field(default_factory=dict)
    """Current values."""
    counts: Mapping[Counter, float] = field(default_factory=dict)
    """Increments since the last heartbeat."""
    observations: Mapping[Histogram, Sequence[float]] = field(default_factory=dict)
    """Observations since the last heartbeat."""
    stalled_s: float = 0.0
    """Seconds that a helper thread has spent on its current piece of work."""


@dataclass(frozen=True)
class Progress:
    """A job has done `step` of `steps`."""

    job_id: int
    step: int
    steps: int
    preview: bytes = b""
    """A small JPEG of the unfinished image, or empty."""


@dataclass(frozen=True)
class Done:
    """A job's result."""

    job_id: int
    result: Any


@dataclass(frozen=True)
class Failed:
    """A job's error."""

    job_id: int
    error: RequestError


Event = Ready | NotReady | Grant | Heartbeat | Progress | Done | Failed
