"""Callbacks of the supervisor: one Task per request, and a Monitor per instance."""

from __future__ import annotations

from typing import Any, Protocol

from genserve_backend.errors import RequestError
from genserve_backend.worker.messages import Heartbeat


class Task(Protocol):
    """Callbacks of one request. The supervisor's thread calls them; none may block for long."""

    @property
    def task_id(self) -> str:
        """Id in the logs."""

    def is_cancelled(self) -> bool:
        """Return whether the caller no longer wants an answer."""

    def on_progress(self, step: int, steps: int, preview: bytes) -> None:
        """Handle progress: `step` of `steps` is done."""

    def on_done(self, result: Any) -> None:
        """Handle the result."""

    def on_failed(self, error: RequestError) -> None:
        """Handle the failure of the request."""


class Monitor(Protocol):
    """Callbacks for the state of the worker. The supervisor's thread calls them."""

    def on_heartbeat(self, beat: Heartbeat) -> None:
        """Handle a heartbeat of the worker."""

    def on_restart(self) -> None:
        """Handle the loss of a worker that had been ready; another one is about to start."""

    def on_poll(self, *, ready: bool) -> None:
        """Handle a sign of life of the supervisor, many times a second, with or without a `ready` worker."""


class NoMonitor:
    """Monitor that does nothing."""

    def on_heartbeat(self, beat: Heartbeat) -> None:
        """Do nothing."""

    def on_restart(self) -> None:
        """Do nothing."""

    def on_poll(self, *, ready: bool) -> None:
        """Do nothing."""
