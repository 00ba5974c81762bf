"""Common parts of the engines that a worker process runs: the protocol, jobs, the inbox and the heartbeat."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

from genserve_backend.errors import Cancelled, DeadlineExceeded, RequestError, ServerError
from genserve_backend.worker.messages import Done, Event, Failed, Heartbeat, Progress, Submit

HEARTBEAT_S = 1.0
"""Minimum interval between two heartbeats, in seconds."""

Emit = Callable[[Event], None]
Message = TypeVar("Message")


class Engine(Protocol):
    """A loaded model that works on requests.

    The thread that listens to the instance calls ``submit`` and ``cancel``. The main thread owns the device and calls
    ``run``. Every job ends with exactly one Done or Failed. While the engine makes progress, it emits a Heartbeat every
    `HEARTBEAT_S` seconds.

    A Grant lets the instance fetch requests from Triton's queue, but does not limit their number: a Triton batch may
    hold more requests than were granted, and requests that survive a dead worker arrive without a grant.
    """

    def submit(self, submit: Submit) -> None:
        """Accept a job."""

    def cancel(self, job_id: int) -> None:
        """Stop working on a job. Ignore one that is unknown or done."""

    def run(self) -> None:
        """Work until the process ends."""


class Inbox(Generic[Message]):
    """Messages from other threads to the one that owns the device."""

    def __init__(self) -> None:
        self._messages: SimpleQueue[Message] = SimpleQueue()

    def put(self, message: Message) -> None:
        """Add a message; callable from any thread."""
        self._messages.put(message)

    def receive(self, *, wait: bool) -> Iterator[Message]:
        """Yield the queued messages. With `wait`, block for up to `HEARTBEAT_S` until the first one arrives."""
        try:
            yield self._messages.get(timeout=HEARTBEAT_S) if wait else self._messages.get_nowait()
            while True:
                yield self._messages.get_nowait()
        except Empty:
            return


class HeartbeatTimer:
    """Heartbeats at intervals of at least `HEARTBEAT_S`.

    Args:
        emit: Receives the heartbeats.
        make: Creates the next heartbeat.
    """

    def __init__(self, emit: Emit, make: Callable[[], Heartbeat] = Heartbeat) -> None:
        self._emit = emit
        self._make = make
        self._last = 0.0

    def beat(self) -> None:
        """Emit a heartbeat if one is due. Cheap: call it wherever the engine makes progress."""
        now = time.monotonic()
        if now - self._last >= HEARTBEAT_S:
            self._last = now
            self._emit(self._make())


class Job:
    """A submitted request, and the events that its engine reports about it.

    Args:
        submit: The instance's message.
        emit: Receives the events.
    """

    def __init__(self, submit: Submit, emit: Emit) -> None:
        self.id = submit.job_id
        self.task_id = submit.task_id
        self.request: Any = submit.request
        self.level = submit.level
        self.arrived = submit.arrived
        """Arrival at the instance, on the clock of time.monotonic()."""
        self.deadline = submit.deadline
        """End of its time, on the same clock."""
        self.has_own_deadline = submit.has_own_deadline
        self._emit = emit
        self._cancelled = False

    def cancel(self) -> None:
        """Mark the job as cancelled; `stop_reason` reports it."""
        self._cancelled = True

    def stop_reason(self) -> RequestError | None:
        """Return Cancelled or DeadlineExceeded if work on the job should stop. Cheap: check at every step."""
        if self._cancelled:
            return Cancelled("the request was cancelled")
        if time.monotonic() > self.deadline:
            return DeadlineExceeded("the request ran past its deadline")
        return None

    def progress(self, step: int, steps: int, preview: bytes = b"") -> None:
        """Report that `step` of `steps` is done."""
        self._emit(Progress(self.id, step, steps, preview))

    def done(self, result: Any) -> None:
        """End the job with a result."""
        self._emit(Done(self.id, result))

    def fail(self, error: RequestError) -> None:
        """End the job with an error."""
        self._emit(Failed(self.id, error))


def defect(error: Exception) -> ServerError:
    """Return the ServerError that a caller gets for an unexpected exception. Its message exposes only the type."""
    return ServerError(f"{type(error).__name__} in the engine; see the server's log")
