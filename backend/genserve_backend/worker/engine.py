"""What a worker process runs is an engine; this is what all of them have in common."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar

from genserve_backend.errors import Cancelled, DeadlineExceeded, RequestError, ServerError
from genserve_backend.worker.messages import Beat, Event, Progress, Submit

BEAT_S = 1.0
"""Seconds between two signs of life."""
PROGRESS_S = 0.1
"""Seconds between two reports of a request's progress, at least."""

Emit = Callable[[Event], None]
Message = TypeVar("Message")

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """A loaded model that works on requests.

    ``submit`` and ``cancel`` are called by the thread that listens to the instance, ``run`` by the main thread, which
    owns the device. Every job ends with one Done or Failed. Grants say when the instance may fetch from Triton's queue,
    not how much: a batch of Triton's may hold more requests than were granted, and those that a dead worker left come
    without a grant. The engine emits a Beat every `BEAT_S` seconds as long as it gets on.
    """

    def submit(self, submit: Submit) -> None:
        """Take a job."""

    def cancel(self, job_id: int) -> None:
        """Stop working on a job. One that is unknown or done is left alone."""

    def run(self) -> None:
        """Work until the process ends."""


class Inbox(Generic[Message]):
    """What other threads have to say to the one that owns the device."""

    def __init__(self) -> None:
        self._messages: SimpleQueue[Message] = SimpleQueue()

    def put(self, message: Message) -> None:
        """Say something; from any thread."""
        self._messages.put(message)

    def take(self, *, wait: bool) -> Iterator[Message]:
        """The messages that came; `wait` a little for the first one."""
        try:
            yield self._messages.get(timeout=BEAT_S) if wait else self._messages.get_nowait()
            while True:
                yield self._messages.get_nowait()
        except Empty:
            return


class Pulse:
    """Says at most once in `BEAT_S` that the engine gets on.

    Args:
        emit: Where beats go.
        take: Makes the next beat.
    """

    def __init__(self, emit: Emit, take: Callable[[], Beat] = Beat) -> None:
        self._emit = emit
        self._take = take
        self._last = 0.0

    def beat(self) -> None:
        """Cheap: call it wherever the engine gets on."""
        now = time.monotonic()
        if now - self._last >= BEAT_S:
            self._last = now
            self._emit(self._take())


@dataclass
class Job:
    """A request inside the worker, and how its engine talks back while it works."""

    submit: Submit
    emit: Emit
    cancelled: bool = False

    @property
    def arrived(self) -> float:
        """Arrival at the instance, on the clock of time.monotonic()."""
        return self.submit.arrived

    def end(self) -> RequestError | None:
        """Cancelled or DeadlineExceeded when the job should not go on. Cheap: look at every step."""
        if self.cancelled:
            return Cancelled("the request was cancelled")
        if time.monotonic() > self.submit.deadline:
            return DeadlineExceeded("the request ran past its deadline")
        return None

    def progress(self, step: int, steps: int, preview: bytes = b"") -> None:
        """Report that `step` of `steps` is done."""
        self.emit(Progress(self.submit.job, step, steps, preview))


def defect(error: Exception) -> ServerError:
    """What a caller hears of an error that is none of a request's kinds."""
    return ServerError(f"{type(error).__name__} in the engine; see the server's log")
