"""An engine in the test's own process; the test runs its turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from genserve_backend.errors import RequestError
from genserve_backend.worker.engine import Emit
from genserve_backend.worker.messages import Done, Event, Failed, Grant, Heartbeat, Progress, Submit
from genserve_backend.worker.metrics import Counter

PATIENCE_S = 60.0
NO_JOB = 0


class TurnedEngine:
    """Submits requests, runs turns until they are answered, and records every event."""

    def __init__(self, build: Callable[[Emit], Any]) -> None:
        self._events: SimpleQueue[Event] = SimpleQueue()
        self.engine = build(self._events.put)
        self.progress: dict[int, list[Progress]] = {}
        self.answers: dict[int, Any] = {}
        self.heartbeats: list[Heartbeat] = []
        self.granted = 0
        self._jobs = 0

    def submit(
        self, request: Any, *, within_s: float = PATIENCE_S, level: int = 2, has_own_deadline: bool = False
    ) -> int:
        self._jobs += 1
        deadline = time.monotonic() + within_s
        name = f"task-{self._jobs}"
        self.engine.submit(Submit(self._jobs, name, request, deadline, level, has_own_deadline=has_own_deadline))
        return self._jobs

    def turn(self, turns: int = 1) -> None:
        for _ in range(turns):
            self.engine.cancel(NO_JOB)  # an engine without work would wait for a message
            self.engine.turn()
            self._receive()

    def turn_until(self, condition: Callable[[], bool]) -> None:
        give_up = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < give_up, "the condition was never met"
            self.turn()
            time.sleep(0.001)  # for the engine's other threads

    def answer(self, job: int) -> Any:
        """Return a result or a RequestError."""
        self.turn_until(lambda: job in self.answers)
        return self.answers[job]

    def run(self, *requests: Any) -> list[Any]:
        """Submit all requests at once, and return their answers."""
        jobs = [self.submit(request) for request in requests]
        return [self.answer(job) for job in jobs]

    def results(self, *requests: Any) -> list[Any]:
        """Submit all requests at once, and return their results; raise the first error."""
        answers = self.run(*requests)
        for answer in answers:
            if isinstance(answer, RequestError):
                raise answer
        return answers

    def _receive(self) -> None:
        try:
            while True:
                self._record(self._events.get_nowait())
        except Empty:
            pass

    def _record(self, event: Event) -> None:
        if isinstance(event, Progress):
            self.progress.setdefault(event.job_id, []).append(event)
        elif isinstance(event, (Done, Failed)):
            assert event.job_id not in self.answers, "answered twice"
            self.answers[event.job_id] = event.result if isinstance(event, Done) else event.error
        elif isinstance(event, Heartbeat):
            self.heartbeats.append(event)
        elif isinstance(event, Grant):
            self.granted += event.count


def count(heartbeats: Sequence[Heartbeat], counter: Counter) -> float:
    """Return the total of a counter over heartbeats."""
    return sum(heartbeat.counts.get(counter, 0) for heartbeat in heartbeats)
