"""Requests of an engine that has no server in front."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from genserve_backend.errors import RequestError


class EngineTask:
    """A request in an engine's worker; a `worker.supervisor.Task`."""

    def __init__(self, task_id: str) -> None:
        self.task_id = task_id
        self.answer: Future[Any] = Future()

    def is_cancelled(self) -> bool:
        """Return False: nothing cancels it."""
        return False

    def on_progress(self, step: int, steps: int, preview: bytes) -> None:
        """Ignore progress."""

    def on_done(self, result: Any) -> None:
        """Keep the result."""
        self.answer.set_result(result)

    def on_failed(self, error: RequestError) -> None:
        """Keep the error."""
        self.answer.set_exception(error)
