"""Work that a gateway repeats until it ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from genserve.gateway.database import StoreUnavailable

REPEAT_S = 1.0

logger = logging.getLogger(__name__)


class Loop:
    """Step that is repeated. One that fails is logged, and the next one follows.

    Args:
        step: The step.
        pause_s: Seconds between two steps, unless `wake` ends the pause.
    """

    def __init__(self, step: Callable[[], Awaitable[object]], pause_s: float) -> None:
        self._step = step
        self._pause_s = pause_s
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the loop."""
        self._task = asyncio.ensure_future(self._run())

    def wake(self) -> None:
        """Let the next step follow at once."""
        self._woken.set()

    async def stop(self) -> None:
        """End the loop, in the middle of a step if need be."""
        if self._task:
            await end([self._task])

    async def _run(self) -> None:
        while True:
            self._woken.clear()
            try:
                await self._step()
            except StoreUnavailable:
                pass  # The database has logged it.
            except Exception:
                logger.exception("a step failed; the next one follows")
            # Not wait_for(), which may miss a cancellation before Python 3.12.
            timer = asyncio.get_running_loop().call_later(self._pause_s, self._woken.set)
            try:
                await self._woken.wait()
            finally:
                timer.cancel()


async def end(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel tasks, and wait until they have ended. A task may miss its cancellation, so it is repeated."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=REPEAT_S)
