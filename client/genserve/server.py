"""One server as a client sees it: requests in flight, speed, and the models for which it is set aside."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from genserve.errors import GenServeError
from genserve.protocol import Call, Outputs
from genserve.transport import AsyncTransport

SMOOTHING = 0.3
"""Weight of the newest request in the mean duration."""
NOISE_S = 0.05
"""Differences of durations up to this one do not matter."""


@dataclass(frozen=True)
class Running:
    """Request in flight."""

    call: Call
    since: float


class Server:
    """One server. For use in one event loop."""

    def __init__(self, transport: AsyncTransport) -> None:
        self.transport = transport
        self.running: dict[asyncio.Future[Outputs], Running] = {}
        self.answered = time.monotonic()
        """Time of the last answer."""
        self._abandoned: dict[asyncio.Future[Outputs], GenServeError] = {}
        self._duration_s: dict[str, float] = {}
        self._failures: Counter[str] = Counter()
        self._aside: set[str] = set()

    @property
    def url(self) -> str:
        """The server's address."""
        return self.transport.url

    def is_aside(self, model: str) -> bool:
        """Return whether requests should go to other servers."""
        return model in self._aside

    def set_aside(self, model: str) -> int:
        """Set the server aside for a model; return the number of its failures in a row."""
        self._aside.add(model)
        self._failures[model] += 1
        return self._failures[model]

    def take_back(self, model: str) -> None:
        """Let requests for a model come again. Only an answer ends the row of failures."""
        self._aside.discard(model)

    def duration_s(self, model: str) -> float | None:
        """Return the mean seconds of a request, None before the first one."""
        return self._duration_s.get(model)

    async def infer(self, call: Call, timeout_s: float) -> Outputs:
        """Send a request.

        Raises:
            GenServeError: Also that of `abandon`, if it was called meanwhile.
        """
        request = asyncio.ensure_future(self.transport.infer(call, timeout_s))
        started = time.monotonic()
        self.running[request] = Running(call, started)
        try:
            outputs = await request
        except asyncio.CancelledError:
            if request in self._abandoned and not _is_cancelled():
                raise self._abandoned[request] from None
            raise
        finally:
            self.running.pop(request, None)
            self._abandoned.pop(request, None)
        self._answered(call.model, time.monotonic() - started)
        return outputs

    def abandon(self, error: Callable[[], GenServeError]) -> list[Call]:
        """Give up all requests in flight: each fails with an error of its own. Return their calls."""
        running = dict(self.running)
        for request in running:
            self._abandoned[request] = error()
            request.cancel()
        return [each.call for each in running.values()]

    def _answered(self, model: str, seconds: float) -> None:
        self.answered = time.monotonic()
        self._failures.pop(model, None)
        self.take_back(model)
        before = self._duration_s.get(model, seconds)
        self._duration_s[model] = before + SMOOTHING * (seconds - before)


def _is_cancelled() -> bool:
    """Return whether the running task itself is being cancelled, False where Python is too old to say."""
    task = asyncio.current_task()
    return bool(task and getattr(task, "cancelling", int)())


def slowness(server: Server, model: str, fastest_s: float) -> int:
    """Return how many times longer than on the fastest server a request takes, at least 1."""
    duration_s = server.duration_s(model)
    return 1 if duration_s is None else max(1, round(duration_s / (fastest_s + NOISE_S)))


async def answers(question: Coroutine[Any, Any, bool]) -> bool:
    """Return a health probe's result, False if the server does not answer."""
    with suppress(GenServeError):
        return await question
    return False
