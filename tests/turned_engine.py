"""An engine in the test's own process, turned by the test."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from genserve_backend.errors import RequestError
from genserve_backend.worker.engine import Emit
from genserve_backend.worker.messages import Beat, Done, Event, Failed, Grant, Progress, Submit

PATIENCE_S = 60.0
NO_JOB = 0


class TurnedEngine:
    """Submits requests, turns the engine until they are answered, and remembers every event."""

    def __init__(self, build: Callable[[Emit], Any]) -> None:
        self._events: SimpleQueue[Event] = SimpleQueue()
        self.engine = build(self._events.put)
        self.progress: dict[int, list[Progress]] = {}
        self.answers: dict[int, Any] = {}
        self.beats: list[Beat] = []
        self.granted = 0
        self._jobs = 0

    def submit(self, request: Any, *, within_s: float = PATIENCE_S, level: int = 2) -> int:
        self._jobs += 1
        deadline = time.monotonic() + within_s
        self.engine.submit(Submit(self._jobs, f"task-{self._jobs}", request, deadline, level))
        return self._jobs

    def turn(self, turns: int = 1) -> None:
        for _ in range(turns):
            self.engine.cancel(NO_JOB)  # or an engine with nothing to do would wait for a message
            self.engine.turn()
            self._read()

    def turn_until(self, condition: Callable[[], bool]) -> None:
        give_up = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < give_up, "the engine never got there"
            self.turn()
            time.sleep(0.001)  # for the engine's other threads

    def answer(self, job: int) -> Any:
        """A result or a RequestError."""
        self.turn_until(lambda: job in self.answers)
        return self.answers[job]

    def run(self, *requests: Any) -> list[Any]:
        """All of them at once."""
        jobs = [self.submit(request) for request in requests]
        return [self.answer(job) for job in jobs]

    def results(self, *requests: Any) -> list[Any]:
        """All of them at once; every one has to succeed."""
        answers = self.run(*requests)
        for answer in answers:
            if isinstance(answer, RequestError):
                raise answer
        return answers

    def _read(self) -> None:
        try:
            while True:
                self._hear(self._events.get_nowait())
        except Empty:
            pass

    def _hear(self, event: Event) -> None:
        if isinstance(event, Progress):
            self.progress.setdefault(event.job, []).append(event)
        elif isinstance(event, (Done, Failed)):
            assert event.job not in self.answers, "answered twice"
            self.answers[event.job] = event.result if isinstance(event, Done) else event.error
        elif isinstance(event, Beat):
            self.beats.append(event)
        elif isinstance(event, Grant):
            self.granted += event.count


def count(beats: Sequence[Beat], name: str) -> float:
    """The sum of a count over the beats."""
    totals: list[Mapping[str, float]] = [beat.counts for beat in beats]
    return sum(each.get(name, 0) for each in totals)
