"""Gives an instance's worker its requests, and replaces it when it dies or gives no sign of life.

What was in flight when a worker died runs again, one request at a time, so that a request which kills workers is
alone when it does so the second time: it then gets ServerError, and its neighbours notice no more than a delay.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from genserve_backend.errors import Cancelled, DeadlineExceeded, RequestError, ServerError, ServerUnavailable
from genserve_backend.logs import log
from genserve_backend.worker.link import WorkerGone, WorkerLink
from genserve_backend.worker.messages import (
    DEFAULT_LEVEL,
    Beat,
    Cancel,
    Done,
    Event,
    Failed,
    Grant,
    NotReady,
    Progress,
    Ready,
    Start,
    Submit,
)
from genserve_backend.worker.threads import exit_on_failure

POLL_S = 0.05
"""How often cancellations and deadlines are looked at."""
MAX_DEATHS = 2
"""In flight at so many worker deaths, a request is answered with ServerError."""
RESTART_BACKOFF_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Wait before the next start, by the number of starts in a row that failed; the last one repeats."""
DEADLINE_GRACE_S = 2.0
"""A worker enforces deadlines at its steps; this much later the supervisor answers in its place."""

SHUTTING_DOWN = Failed(-1, ServerUnavailable("the server is shutting down"))

logger = logging.getLogger(__name__)


class WorkerStartError(Exception):
    """The first worker could not load its model; the message says why in one line."""


class Task(Protocol):
    """One request, as its caller sees it. The supervisor's thread calls these; none may block for long."""

    @property
    def task_id(self) -> str:
        """The id in the logs."""

    def is_cancelled(self) -> bool:
        """Whether the caller no longer wants an answer."""

    def on_progress(self, step: int, steps: int, preview: bytes) -> None:
        """`step` of `steps` is done."""

    def on_done(self, result: Any) -> None:
        """The result is here."""

    def on_failed(self, error: RequestError) -> None:
        """The request failed."""


class Monitor(Protocol):
    """Who counts what an instance does. The supervisor's thread calls it."""

    def on_beat(self, beat: Beat) -> None:
        """The worker lives."""

    def on_restart(self) -> None:
        """A worker that had been ready is gone, and another one is about to start."""


class NoMonitor:
    """Counts nothing."""

    def on_beat(self, beat: Beat) -> None:
        """Nothing."""

    def on_restart(self) -> None:
        """Nothing."""


@dataclass(eq=False)
class _Entry:
    """A request that was taken and not yet answered."""

    job: int
    task: Task
    request: Any
    deadline: float
    level: int
    arrived: float = field(default_factory=time.monotonic)
    deaths: int = 0
    cancel_sent: bool = False


class Supervisor:
    """One worker process at a time, and the requests of one instance.

    Thread-safe. All callbacks come from one thread. The same thread starts the workers: PR_SET_PDEATHSIG watches the
    starting thread, which therefore has to live as long as they do.

    Args:
        start: What every worker of this instance is told first.
        monitor: Counts what happens.
    """

    def __init__(self, start: Start, monitor: Monitor | None = None) -> None:
        self._start = start
        self._monitor = monitor or NoMonitor()
        self._changed = threading.Condition()  # guards everything below
        self._queue: deque[_Entry] = deque()
        self._sent: dict[int, _Entry] = {}
        self._jobs = 0
        self._granted = 0  # requests that the worker has asked for and not been given
        self._link: WorkerLink | None = None
        self._ready = False
        self._was_ready = False
        self._start_error: str | None = None
        self._closing = False
        self._callers_seen = 0.0
        self._thread = threading.Thread(target=exit_on_failure, args=(self._watch,), name="supervisor", daemon=True)

    def start(self) -> None:
        """Start the first worker and wait until it has loaded its model.

        Raises:
            WorkerStartError: It could not.
        """
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._was_ready or self._start_error)
            if self._start_error:
                raise WorkerStartError(self._start_error)

    def submit(self, task: Task, request: Any, *, deadline: float, level: int = DEFAULT_LEVEL) -> None:
        """Take a request; its task hears of exactly one end. `deadline` is on the clock of time.monotonic()."""
        with self._changed:
            entry = _Entry(self._jobs, task, request, deadline, level)
            self._jobs += 1
            closing = self._closing
            if not closing:
                self._queue.append(entry)
                self._dispatch()
        if closing:
            self._answer(entry, SHUTTING_DOWN)

    def wait_for_slot(self) -> None:
        """Block until the instance can run another request: its worker is up, and asks for one."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or (self._granted > 0 and not self._queue))

    @property
    def has_room(self) -> bool:
        """Whether `wait_for_slot` would not block."""
        with self._changed:
            return self._closing or (self._granted > 0 and not self._queue)

    @property
    def is_closing(self) -> bool:
        """Whether the end has begun."""
        return self._closing

    def close(self) -> None:
        """End the worker and the watching thread; answer what is still in flight with ServerUnavailable."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def worker_pid(self) -> int | None:
        """The process id of the current worker."""
        link = self._link
        return link.pid if link else None

    # The watching thread.

    def _watch(self) -> None:
        failed_starts = 0
        while not self._closing:
            cause, was_ready = self._run_worker()
            if self._closing:
                break
            failed_starts = 0 if was_ready else failed_starts + 1
            if was_ready:
                self._monitor.on_restart()
            self._sort_out_death(cause, loading=not was_ready)
            if not self._was_ready:
                break
            self._pause(RESTART_BACKOFF_S[min(failed_starts, len(RESTART_BACKOFF_S) - 1)])
        self._answer_all(SHUTTING_DOWN)

    def _run_worker(self) -> tuple[str, bool]:
        """Run one worker until it is gone: why it went, and whether it had loaded its model."""
        try:
            link = WorkerLink(self._start)
        except OSError as error:
            return f"cannot start a process: {error.strerror}", False
        except Exception as error:
            logger.exception("worker not started", extra={"fields": {"instance": self._start.instance}})
            return f"cannot start a process: {type(error).__name__}", False
        with self._changed:
            self._link = link
        self._log(logging.INFO, "worker started", worker=link.pid)
        reason = self._attend(link)
        with self._changed:
            was_ready, self._ready = self._ready, False
            self._granted = 0
        ending = link.end()
        return reason or ending, was_ready

    def _pause(self, seconds: float) -> None:
        """Wait before the next start, with an eye on callers who will not."""
        until = time.monotonic() + seconds
        while not self._closing and time.monotonic() < until:
            self._look_after_callers()
            time.sleep(POLL_S)

    def _attend(self, link: WorkerLink) -> str:
        """Hear the worker and its callers until it is gone; return the reason, where it gave one."""
        settings = self._start.settings
        reason = ""
        heard = moved = time.monotonic()
        while not self._closing:
            try:
                event = link.receive(timeout=POLL_S)
            except WorkerGone:
                break
            now = time.monotonic()
            if isinstance(event, NotReady):
                reason = event.reason
            elif event is not None:
                if isinstance(event, Beat):
                    heard = now - event.stalled_s
                elif isinstance(event, Ready):
                    heard = now
                self._take(event)
            if not self._ready and now > heard + settings.start_timeout_s:
                return f"the model was not loaded within {settings.start_timeout_s:g} s"
            # It does not beat while it loads, and a large model takes its time.
            moved = moved if not self._ready and link.is_stopped else now
            if now > moved + settings.hang_timeout_s:
                return f"stopped for {settings.hang_timeout_s:g} s while it loaded the model"
            if self._ready and now > heard + settings.hang_timeout_s:
                return f"no sign of life for {settings.hang_timeout_s:g} s"
            if now >= self._callers_seen + POLL_S:
                self._callers_seen = now
                self._look_after_callers()
        return reason

    def _take(self, event: Event) -> None:
        if isinstance(event, Beat):
            self._monitor.on_beat(event)
            return
        entry = None
        with self._changed:
            if isinstance(event, Ready):
                self._ready = self._was_ready = True
                self._log(logging.INFO, "worker ready", worker=self.worker_pid)
            elif isinstance(event, Grant):
                self._granted += event.count
            elif isinstance(event, Progress):
                entry = self._sent.get(event.job)
            elif isinstance(event, (Done, Failed)):
                entry = self._sent.pop(event.job, None)
            self._dispatch()
            self._changed.notify_all()
        if entry:  # else it is no request's event, or that of one whose deadline had passed
            self._answer(entry, event)

    def _answer(self, entry: _Entry, event: Event) -> None:
        """Tell a request's task. What it raises is a defect of its own, and must not take the instance along."""
        try:
            if isinstance(event, Progress):
                entry.task.on_progress(event.step, event.steps, event.preview)
            elif isinstance(event, Done):
                entry.task.on_done(event.result)
            elif isinstance(event, Failed):
                entry.task.on_failed(event.error)
        except Exception:
            logger.exception("task callback failed", extra={"fields": {"task_id": entry.task.task_id}})

    def _is_cancelled(self, entry: _Entry) -> bool:
        try:
            return entry.task.is_cancelled()
        except Exception:
            logger.exception("task callback failed", extra={"fields": {"task_id": entry.task.task_id}})
            return False

    def _look_after_callers(self) -> None:
        now = time.monotonic()
        with self._changed:
            waiting, running = list(self._queue), list(self._sent.values())
        for entry in waiting:
            if self._is_cancelled(entry):
                self._withdraw(entry, Cancelled("the request was cancelled"))
            elif now > entry.deadline:
                self._withdraw(entry, DeadlineExceeded("the request waited past its deadline"))
        for entry in running:
            if now > entry.deadline + DEADLINE_GRACE_S:
                self._withdraw(entry, DeadlineExceeded("the request ran past its deadline"))
            elif not entry.cancel_sent and self._is_cancelled(entry):
                entry.cancel_sent = True
                self._cancel(entry)

    def _withdraw(self, entry: _Entry, error: RequestError) -> None:
        """Answer a request in the worker's place, if it still has no answer."""
        with self._changed:
            if entry in self._queue:
                self._queue.remove(entry)
            elif self._sent.pop(entry.job, None):
                self._cancel(entry)
            else:
                return
            self._changed.notify_all()
        self._answer(entry, Failed(entry.job, error))

    def _sort_out_death(self, cause: str, *, loading: bool) -> None:
        """Decide what becomes of the requests of a worker that has died."""
        with self._changed:
            in_flight = list(self._sent.values())
            self._sent.clear()
            for entry in in_flight:
                entry.deaths += 1
            given_up = [entry for entry in in_flight if entry.deaths >= MAX_DEATHS]
            again = [entry for entry in in_flight if entry.deaths < MAX_DEATHS]
            self._queue.extendleft(reversed(again))
            if not self._was_ready:
                self._start_error = cause
            self._changed.notify_all()
        self._log(
            logging.ERROR,
            "worker failed to start" if loading else "worker died",
            cause=cause,
            again=",".join(entry.task.task_id for entry in again) or None,
            given_up=",".join(entry.task.task_id for entry in given_up) or None,
        )
        for entry in given_up:
            error = ServerError(f"the worker died {MAX_DEATHS} times while it ran this request")
            self._answer(entry, Failed(entry.job, error))
        if loading:
            self._answer_all(Failed(-1, ServerUnavailable(f"the worker cannot start: {cause}")))

    def _answer_all(self, event: Failed) -> None:
        with self._changed:
            entries = [*self._sent.values(), *self._queue]
            self._sent.clear()
            self._queue.clear()
            self._changed.notify_all()
        for entry in entries:
            self._answer(entry, event)

    # With the lock held, from any thread.

    def _dispatch(self) -> None:
        """Send what may run now; a request that saw a worker die runs alone."""
        while self._ready and self._link and self._queue:
            if self._sent and (self._queue[0].deaths or any(entry.deaths for entry in self._sent.values())):
                return
            entry = self._queue.popleft()
            self._sent[entry.job] = entry
            self._granted -= 1
            self._link.send(
                Submit(entry.job, entry.task.task_id, entry.request, entry.deadline, entry.level, entry.arrived)
            )

    def _cancel(self, entry: _Entry) -> None:
        if self._link:
            self._link.send(Cancel(entry.job))

    def _log(self, level: int, event: str, **fields: object) -> None:
        log(logger, level, event, instance=self._start.instance, **fields)
