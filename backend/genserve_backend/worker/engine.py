"""What a worker process runs: handlers, and the engine that gives them one job after another."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Lock
from typing import Any, Protocol

from genserve_backend.errors import Cancelled, DeadlineExceeded, RequestError, ServerError
from genserve_backend.worker.messages import Done, Event, Failed, Progress, Submit

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """A request inside the worker, and how its handler talks back while it works."""

    submit: Submit
    emit: Callable[[Event], None]
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False

    @property
    def waited_s(self) -> float:
        """Seconds since the job reached the worker."""
        return time.monotonic() - self.arrived

    def check(self) -> None:
        """Raise Cancelled or DeadlineExceeded when the job should not go on. Cheap: call it at every step."""
        if self.cancelled:
            raise Cancelled("the request was cancelled")
        if time.monotonic() > self.submit.deadline:
            raise DeadlineExceeded("the request ran past its deadline")

    def progress(self, step: int, steps: int, preview: bytes = b"") -> None:
        """Report that `step` of `steps` is done."""
        self.emit(Progress(self.submit.job, step, steps, preview))


class Handler(Protocol):
    """A loaded model that turns one request into one result."""

    def __call__(self, request: Any, job: Job) -> Any:
        """Return the result, or raise a RequestError. Calls ``job.check()`` now and then."""


class SerialEngine:
    """Runs one job after another, in the order they came.

    ``submit`` and ``cancel`` are called by the thread that listens to the instance, ``run`` by the main thread,
    which owns the device.
    """

    def __init__(self, handler: Handler, emit: Callable[[Event], None]) -> None:
        self._handler = handler
        self._emit = emit
        self._jobs: dict[int, Job] = {}
        self._queue: SimpleQueue[Job] = SimpleQueue()
        self._lock = Lock()

    def submit(self, submit: Submit) -> None:
        """Queue a job."""
        job = Job(submit, self._emit)
        with self._lock:
            self._jobs[submit.job] = job
        self._queue.put(job)

    def cancel(self, job_id: int) -> None:
        """Mark a job, so that its next check raises. A job that is unknown or done is left alone."""
        with self._lock:
            job = self._jobs.get(job_id)
        if job:
            job.cancelled = True

    def run(self) -> None:
        """Work until the process ends."""
        while True:
            job = self._queue.get()
            event = self._handle(job)
            with self._lock:
                del self._jobs[job.submit.job]
            self._emit(event)

    def _handle(self, job: Job) -> Event:
        try:
            job.check()
            return Done(job.submit.job, self._handler(job.submit.request, job))
        except RequestError as error:
            return Failed(job.submit.job, error)
        except Exception as error:
            # A defect, but this request's alone: the log has the traceback, the caller a name.
            logger.exception("job failed", extra={"fields": {"task_id": job.submit.task_id}})
            return Failed(job.submit.job, ServerError(f"{type(error).__name__} in the engine; see the server's log"))
