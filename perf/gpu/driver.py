"""Engines in the part's own process: turned by hand where a step is measured, in a thread of their own as served."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from genserve_backend.worker.messages import Beat, Done, Event, Failed, Submit

NEVER_S = 36_000.0
NO_JOB = 0


class Driver:
    """An engine and the jobs that it was given.

    Args:
        build: Makes the engine; takes the function that gets its events.
    """

    def __init__(self, build: Callable[[Callable[[Event], None]], Any]) -> None:
        self._events: SimpleQueue[Event | BaseException] = SimpleQueue()
        self.engine = build(self._events.put)
        self.beats: list[Beat] = []
        self.results: dict[int, Any] = {}
        self._jobs = 0

    def submit(self, requests: Sequence[Any]) -> list[int]:
        """Hand in requests; return their numbers."""
        first = self._jobs + 1
        for request in requests:
            self._jobs += 1
            deadline = time.monotonic() + NEVER_S
            self.engine.submit(Submit(self._jobs, f"task-{self._jobs}", request, deadline))
        return list(range(first, self._jobs + 1))

    def hear(self, *, timeout_s: float | None = 0.0) -> None:
        """Take in the events that came.

        Args:
            timeout_s: Seconds to wait for the first one; None for ever.

        Raises:
            RequestError: A job has failed.
        """
        try:
            event = self._events.get(timeout=timeout_s) if timeout_s != 0 else self._events.get_nowait()
            while True:
                self._take(event)
                event = self._events.get_nowait()
        except Empty:
            return

    def _take(self, event: Event | BaseException) -> None:
        if isinstance(event, BaseException):
            raise event
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Done):
            self.results[event.job] = event.result
        elif isinstance(event, Beat):
            self.beats.append(event)


class Turned(Driver):
    """An engine whose turns the caller takes, one by one."""

    def turn(self) -> None:
        """Take a turn, even where there is nothing to do."""
        self.engine.cancel(NO_JOB)  # or an engine with nothing to do would wait for a message
        self.engine.turn()

    def finish(self, jobs: Sequence[int]) -> list[Any]:
        """Take turns until these jobs are done; return their results."""
        while not all(job in self.results for job in jobs):
            self.turn()
            self.hear()
        return [self.results.pop(job) for job in jobs]

    def drop(self, jobs: Sequence[int]) -> None:
        """Give up jobs that are not done."""
        for job in jobs:
            self.engine.cancel(job)
        self.turn()
        try:
            while True:
                self._events.get_nowait()
        except Empty:
            return


class Served(Driver):
    """An engine that works in a thread of its own."""

    def __init__(self, build: Callable[[Callable[[Event], None]], Any]) -> None:
        super().__init__(build)
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        try:
            self.engine.run()
        except BaseException as error:
            self._events.put(error)

    def __call__(self, requests: Sequence[Any]) -> list[Any]:
        """Hand in all requests at once; return their results."""
        jobs = self.submit(requests)
        while not all(job in self.results for job in jobs):
            self.hear(timeout_s=None)
        return [self.results.pop(job) for job in jobs]
