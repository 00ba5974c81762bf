"""What an instance and its worker process say to each other, over one private socket pair.

Both ends are the same code on the same machine and the socket is inherited, never named: pickling is safe here,
and nothing that a client sent is unpickled (a request travels as plain strings and numbers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from genserve_backend.errors import RequestError
from genserve_backend.settings import ModelSettings


@dataclass(frozen=True)
class Start:
    """First word to a worker: which engine to build, with what, and where."""

    engine: str
    """``package.module:factory``; the factory takes (settings, device) and returns a `worker.engine.Handler`."""
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


Event = Ready | NotReady | Progress | Done | Failed
