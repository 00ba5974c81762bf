"""Engines in the part's own process: stepped by the caller, or in a thread of their own as served."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from genserve_backend.worker.messages import Done, Event, Failed, Heartbeat, Submit

NO_DEADLINE_S = 36_000.0
NO_JOB = 0
PAUSE_S = 0.001
"""Wait between the caller's turns: without it they would starve the engine's other threads of the interpreter."""


class Driver:
    """An engine and its jobs.

    Args:
        build: Factory of the engine; its argument is the function that receives events.
    """

    def __init__(self, build: Callable[[Callable[[Event], None]], Any]) -> None:
        self._events: SimpleQueue[Event | BaseException] = SimpleQueue()
        self.engine = build(self._events.put)
        self.heartbeats: list[Heartbeat] = []
        self.results: dict[int, Any] = {}
        self._jobs = 0

    def submit(self, requests: Sequence[Any]) -> list[int]:
        """Submit requests; return their job ids."""
        first = self._jobs + 1
        for request in requests:
            self._jobs += 1
            deadline = time.monotonic() + NO_DEADLINE_S
            self.engine.submit(Submit(self._jobs, f"task-{self._jobs}", request, deadline))
        return list(range(first, self._jobs + 1))

    def receive(self, *, timeout_s: float | None = 0.0) -> None:
        """Receive the pending events.

        Args:
            timeout_s: Seconds to wait for the first one; None to wait forever.

        Raises:
            RequestError: A job failed.
        """
        try:
            event = self._events.get(timeout=timeout_s) if timeout_s != 0 else self._events.get_nowait()
            while True:
                self._handle(event)
                event = self._events.get_nowait()
        except Empty:
            return

    def _handle(self, event: Event | BaseException) -> None:
        if isinstance(event, BaseException):
            raise event
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Done):
            self.results[event.job_id] = event.result
        elif isinstance(event, Heartbeat):
            self.heartbeats.append(event)


class SteppedDriver(Driver):
    """A driver whose caller steps the engine, turn by turn."""

    def turn(self) -> None:
        """Take a turn, even without work."""
        self.engine.cancel(NO_JOB)  # without work the engine would wait for a message
        self.engine.turn()

    def finish(self, jobs: Sequence[int]) -> list[Any]:
        """Take turns until these jobs are done; return their results."""
        while not all(job in self.results for job in jobs):
            self.turn()
            self.receive(timeout_s=PAUSE_S)
        return [self.results.pop(job) for job in jobs]

    def cancel(self, jobs: Sequence[int]) -> None:
        """Cancel jobs."""
        for job in jobs:
            self.engine.cancel(job)
        self.turn()
        try:
            while True:
                self._events.get_nowait()
        except Empty:
            return


class ThreadedDriver(Driver):
    """A driver with the engine in a thread of its own."""

    def __init__(self, build: Callable[[Callable[[Event], None]], Any]) -> None:
        super().__init__(build)
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        try:
            self.engine.run()
        except BaseException as error:
            self._events.put(error)

    def __call__(self, requests: Sequence[Any]) -> list[Any]:
        """Submit all requests at once; return their results."""
        jobs = self.submit(requests)
        while not all(job in self.results for job in jobs):
            self.receive(timeout_s=None)
        return [self.results.pop(job) for job in jobs]
