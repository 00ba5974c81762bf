"""Supervisor of an instance's worker: passes on requests, and replaces the worker when it dies or hangs.

Requests that were in flight when a worker died run again, one at a time. A request that kills workers is therefore
alone when it does so the second time: it gets ServerError, and other requests are only delayed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from genserve_backend.errors import Cancelled, DeadlineExceeded, RequestError, ServerError, ServerUnavailable
from genserve_backend.logs import log
from genserve_backend.worker.callbacks import Monitor, NoMonitor, Task
from genserve_backend.worker.link import WorkerGone, WorkerLink
from genserve_backend.worker.messages import (
    DEFAULT_LEVEL,
    Cancel,
    Done,
    Event,
    Failed,
    Grant,
    Heartbeat,
    NotReady,
    Progress,
    Ready,
    Start,
    Submit,
)
from genserve_backend.worker.threads import exit_on_failure

POLL_S = 0.05
"""Interval between two checks of cancellations and deadlines, and two signs of life, in seconds."""
MAX_DEATHS = 2
"""Worker deaths with a request in flight, after which it gets ServerError."""
RESTART_BACKOFF_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Delay before the next start, by the number of failed starts in a row; the last one repeats."""
DEADLINE_GRACE_S = 2.0
"""Seconds after a deadline until the supervisor answers in place of the worker, which checks deadlines per step."""

SHUTTING_DOWN = Failed(-1, ServerUnavailable("the server is shutting down"))

logger = logging.getLogger(__name__)


class WorkerStartError(Exception):
    """The first worker could not load its model; the message is one line."""


@dataclass(eq=False)
class _Entry:
    """A submitted request that is not answered yet."""

    job_id: int
    task: Task
    request: Any
    deadline: float
    level: int
    has_own_deadline: bool
    arrived: float = field(default_factory=time.monotonic)
    deaths: int = 0
    cancel_sent: bool = False


class Supervisor:
    """One worker process at a time, and the requests of one instance.

    Thread-safe. All callbacks come from one thread. The same thread starts the workers: PR_SET_PDEATHSIG watches the
    starting thread, which therefore has to live as long as they do.

    Args:
        start: First message to every worker of this instance.
    """

    def __init__(self, start: Start) -> None:
        self._start = start
        self._monitor: Monitor = NoMonitor()
        self._changed = threading.Condition()  # guards everything below
        self._queue: deque[_Entry] = deque()
        self._sent: dict[int, _Entry] = {}
        self._jobs = 0
        self._granted = 0  # grants of the worker that are not used yet
        self._link: WorkerLink | None = None
        self._ready = False
        self._was_ready = False
        self._start_error: str | None = None
        self._closing = False
        self._polled = 0.0
        self._thread = threading.Thread(target=exit_on_failure, args=(self._watch,), name="supervisor", daemon=True)

    def start(self, monitor: Monitor | None = None) -> None:
        """Start the first worker and wait until it has loaded its model.

        Args:
            monitor: Observes the workers.

        Raises:
            WorkerStartError: The worker could not load its model.
        """
        if monitor:
            self._monitor = monitor
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._was_ready or self._start_error)
            if self._start_error:
                raise WorkerStartError(self._start_error)

    def submit(
        self,
        task: Task,
        request: Any,
        *,
        deadline: float,
        level: int = DEFAULT_LEVEL,
        has_own_deadline: bool = False,
    ) -> None:
        """Queue a request; its task gets exactly one result or error. `deadline` is a time.monotonic() value."""
        with self._changed:
            entry = _Entry(self._jobs, task, request, deadline, level, has_own_deadline)
            self._jobs += 1
            closing = self._closing
            if not closing:
                self._queue.append(entry)
                self._dispatch()
        if closing:
            self._answer(entry, SHUTTING_DOWN)

    def wait_for_slot(self) -> None:
        """Block until the instance can accept another request: its worker is ready and has granted one."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or (self._granted > 0 and not self._queue))

    @property
    def has_room(self) -> bool:
        """True if `wait_for_slot` would not block."""
        with self._changed:
            return self._closing or (self._granted > 0 and not self._queue)

    @property
    def is_closing(self) -> bool:
        """True once `close` has been called."""
        return self._closing

    def close(self) -> None:
        """End the worker and the supervisor's thread; fail the requests in flight with ServerUnavailable."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def worker_pid(self) -> int | None:
        """The process id of the current worker."""
        link = self._link
        return link.pid if link else None

    # The supervisor's thread.

    def _watch(self) -> None:
        failed_starts = 0
        while not self._closing:
            cause, was_ready = self._run_worker()
            if self._closing:
                break
            failed_starts = 0 if was_ready else failed_starts + 1
            if was_ready:
                self._monitor.on_restart()
            self._handle_death(cause, loading=not was_ready)
            if not self._was_ready:
                break
            self._pause(RESTART_BACKOFF_S[min(failed_starts, len(RESTART_BACKOFF_S) - 1)])
        self._answer_all(SHUTTING_DOWN)

    def _run_worker(self) -> tuple[str, bool]:
        """Run one worker until it is gone; return the cause, and whether it had loaded its model."""
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
        """Wait before the next start, and meanwhile check cancellations and deadlines."""
        until = time.monotonic() + seconds
        while not self._closing and time.monotonic() < until:
            self._poll()
            time.sleep(POLL_S)

    def _attend(self, link: WorkerLink) -> str:
        """Handle the worker's events and its callers until it is gone; return the reason, if it gave one."""
        settings = self._start.settings
        reason = ""
        last_heartbeat = last_running = time.monotonic()
        while not self._closing:
            try:
                event = link.receive(timeout=POLL_S)
            except WorkerGone:
                break
            now = time.monotonic()
            if isinstance(event, NotReady):
                reason = event.reason
            elif event is not None:
                if isinstance(event, Heartbeat):
                    last_heartbeat = now - event.stalled_s
                elif isinstance(event, Ready):
                    last_heartbeat = now
                self._handle(event)
            if not self._ready and now > last_heartbeat + settings.start_timeout_s:
                return f"the model was not loaded within {settings.start_timeout_s:g} s"
            # There are no heartbeats during loading, and a large model takes long to load.
            last_running = last_running if not self._ready and link.is_stopped else now
            if now > last_running + settings.hang_timeout_s:
                return f"stopped for {settings.hang_timeout_s:g} s while it loaded the model"
            if self._ready and now > last_heartbeat + settings.hang_timeout_s:
                return f"no sign of life for {settings.hang_timeout_s:g} s"
            if now >= self._polled + POLL_S:
                self._polled = now
                self._poll()
        return reason

    def _handle(self, event: Event) -> None:
        if isinstance(event, Heartbeat):
            self._monitor.on_heartbeat(event)
            return
        entry = None
        with self._changed:
            if isinstance(event, Ready):
                self._ready = self._was_ready = True
                self._log(logging.INFO, "worker ready", worker=self.worker_pid)
            elif isinstance(event, Grant):
                self._granted += event.count
            elif isinstance(event, Progress):
                entry = self._sent.get(event.job_id)
            elif isinstance(event, (Done, Failed)):
                entry = self._sent.pop(event.job_id, None)
            self._dispatch()
            self._changed.notify_all()
        if entry:  # None for a worker event, or a request that was already answered
            self._answer(entry, event)

    def _answer(self, entry: _Entry, event: Event) -> None:
        """Call a request's task. An exception there is logged, so that it cannot end the instance."""
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

    def _poll(self) -> None:
        self._monitor.on_poll(ready=self._ready)
        self._check_callers()

    def _check_callers(self) -> None:
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
        """Answer a request in place of the worker, if it has no answer yet."""
        with self._changed:
            if entry in self._queue:
                self._queue.remove(entry)
            elif self._sent.pop(entry.job_id, None):
                self._cancel(entry)
            else:
                return
            self._changed.notify_all()
        self._answer(entry, Failed(entry.job_id, error))

    def _handle_death(self, cause: str, *, loading: bool) -> None:
        """Requeue or fail the requests of a worker that has died."""
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
            self._answer(entry, Failed(entry.job_id, error))
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

    # Called with the lock held, from any thread.

    def _dispatch(self) -> None:
        """Send the requests that may run now; one that was in flight at a worker death runs alone."""
        while self._ready and self._link and self._queue:
            if self._sent and (self._queue[0].deaths or any(entry.deaths for entry in self._sent.values())):
                return
            entry = self._queue.popleft()
            self._sent[entry.job_id] = entry
            self._granted -= 1
            self._link.send(
                Submit(
                    entry.job_id,
                    entry.task.task_id,
                    entry.request,
                    entry.deadline,
                    entry.level,
                    entry.arrived,
                    entry.has_own_deadline,
                )
            )

    def _cancel(self, entry: _Entry) -> None:
        if self._link:
            self._link.send(Cancel(entry.job_id))

    def _log(self, level: int, event: str, **fields: object) -> None:
        log(logger, level, event, instance=self._start.instance, **fields)
