"""What an instance and its worker process say to each other, over one private socket pair.

Both ends are the same code on the same machine and the socket is inherited, never named: pickling is safe here,
and nothing that a client sent is unpickled (a request travels as plain strings and numbers).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from genserve_backend.errors import RequestError
from genserve_backend.settings import ModelSettings

LEVELS = (1, 2, 3)
DEFAULT_LEVEL = 2
"""Priority levels as Triton counts them, and the one that a request has which names none."""


@dataclass(frozen=True)
class Start:
    """First word to a worker: which engine to build, with what, and where."""

    engine: str
    """``package.module:factory``; the factory takes (settings, device, emit) and returns a `worker.engine.Engine`."""
    settings: ModelSettings
    device: str
    instance: str


@dataclass(frozen=True)
class Submit:
    """Run `request`."""

    job: int
    task_id: str
    request: Any
    deadline: float
    """On the clock of time.monotonic(), which all processes of a machine share on Linux."""
    level: int = DEFAULT_LEVEL
    """Triton's priority level: 1 is the most urgent."""
    arrived: float = field(default_factory=time.monotonic)
    """Arrival at the instance, on the same clock as `deadline`; a request that runs again keeps it."""


@dataclass(frozen=True)
class Cancel:
    """Stop working on a job; it is still answered, with Failed(Cancelled)."""

    job: int


@dataclass(frozen=True)
class Ready:
    """The worker has loaded its model."""


@dataclass(frozen=True)
class NotReady:
    """The worker cannot load its model, and has exited."""

    reason: str


@dataclass(frozen=True)
class Grant:
    """The engine can take so many requests more than it has been given and has asked for already."""

    count: int


@dataclass(frozen=True)
class Beat:
    """The thread that owns the device gets on; with it goes what an operator wants to count."""

    gauges: Mapping[str, float] = field(default_factory=dict)
    """Values as they are now, by metric name."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """What has been added since the last beat, by metric name."""
    batch_sizes: tuple[int, ...] = ()
    """Of the forwards since the last beat."""
    stalled_s: float = 0.0
    """Seconds that a thread beside that one has spent on one piece of work."""


@dataclass(frozen=True)
class Progress:
    """A job is at `step` of `steps`."""

    job: int
    step: int
    steps: int
    preview: bytes = b""
    """A small JPEG of the image so far, or nothing."""


@dataclass(frozen=True)
class Done:
    """A job's result."""

    job: int
    result: Any


@dataclass(frozen=True)
class Failed:
    """A job's error."""

    job: int
    error: RequestError


Event = Ready | NotReady | Grant | Beat | Progress | Done | Failed
