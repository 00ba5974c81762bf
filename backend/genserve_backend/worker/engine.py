"""What a worker process runs: an engine. The one here gives a handler one job after another."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any, Protocol

from genserve_backend.errors import Cancelled, DeadlineExceeded, RequestError, ServerError
from genserve_backend.worker.messages import Beat, Done, Event, Failed, Grant, Progress, Submit

BEAT_S = 1.0
"""Seconds between two signs of life."""

Emit = Callable[[Event], None]

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """A loaded model that works on requests.

    ``submit`` and ``cancel`` are called by the thread that listens to the instance, ``run`` by the main thread, which
    owns the device. Every job ends with one Done or Failed. The engine is given requests only as it emits Grants, but
    for those that a dead worker left: they come without. It emits a Beat every `BEAT_S` seconds as long as it gets on.
    """

    def submit(self, submit: Submit) -> None:
        """Take a job."""

    def cancel(self, job_id: int) -> None:
        """Stop working on a job. One that is unknown or done is left alone."""

    def run(self) -> None:
        """Work until the process ends."""


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
    """A request inside the worker, and how its handler talks back while it works."""

    submit: Submit
    emit: Emit
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    beat: Callable[[], None] = lambda: None

    @property
    def waited_s(self) -> float:
        """Seconds since the job reached the worker."""
        return time.monotonic() - self.arrived

    def end(self) -> RequestError | None:
        """Cancelled or DeadlineExceeded when the job should not go on. Cheap: look at every step."""
        if self.cancelled:
            return Cancelled("the request was cancelled")
        if time.monotonic() > self.submit.deadline:
            return DeadlineExceeded("the request ran past its deadline")
        return None

    def check(self) -> None:
        """Raise what `end` says, if anything, and show that the handler gets on."""
        self.beat()
        if error := self.end():
            raise error

    def progress(self, step: int, steps: int, preview: bytes = b"") -> None:
        """Report that `step` of `steps` is done."""
        self.emit(Progress(self.submit.job, step, steps, preview))


class Handler(Protocol):
    """A loaded model that turns one request into one result."""

    def __call__(self, request: Any, job: Job) -> Any:
        """Return the result, or raise a RequestError. Calls ``job.check()`` now and then."""


class SerialEngine:
    """Runs one job after another, in the order they came.

    Args:
        handler: Does the work.
        emit: Where events go.
        slots: How many jobs the engine holds, the running one among them.
    """

    def __init__(self, handler: Handler, emit: Emit, *, slots: int) -> None:
        self._handler = handler
        self._emit = emit
        self._slots = slots
        self._pulse = Pulse(emit)
        self._jobs: dict[int, Job] = {}
        self._queue: SimpleQueue[Job] = SimpleQueue()
        self._lock = Lock()

    def submit(self, submit: Submit) -> None:
        """Queue a job."""
        job = Job(submit, self._emit, beat=self._pulse.beat)
        with self._lock:
            self._jobs[submit.job] = job
        self._queue.put(job)

    def cancel(self, job_id: int) -> None:
        """Mark a job, so that its next check raises."""
        with self._lock:
            job = self._jobs.get(job_id)
        if job:
            job.cancelled = True

    def run(self) -> None:
        """Work until the process ends."""
        self._emit(Grant(self._slots))
        while True:
            self._pulse.beat()
            try:
                job = self._queue.get(timeout=BEAT_S)
            except Empty:
                continue
            event = self._handle(job)
            with self._lock:
                del self._jobs[job.submit.job]
            self._emit(event)
            self._emit(Grant(1))

    def _handle(self, job: Job) -> Event:
        try:
            job.check()
            return Done(job.submit.job, self._handler(job.submit.request, job))
        except RequestError as error:
            return Failed(job.submit.job, error)
        except Exception as error:
            # A defect, but this request's alone: the log has the traceback, the caller a name.
            logger.exception("job failed", extra={"fields": {"task_id": job.submit.task_id}})
            return Failed(job.submit.job, defect(error))


def defect(error: Exception) -> ServerError:
    """What a caller hears of an error that is none of a request's kinds."""
    return ServerError(f"{type(error).__name__} in the engine; see the server's log")
