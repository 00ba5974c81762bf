"""Tasks of one kind that a gateway runs, and the number of them at once."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from genserve.concurrency import Concurrency
from genserve.errors import GenServeError, ServerUnavailable
from genserve.gateway.records import Kind, StoredTask

FULL_PAUSE_S = 0.5
"""Seconds without further tasks after a full queue."""
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 5.0
"""Seconds without further tasks while no server is reachable; they double from the first to the longest."""
TRIAL_S = 1.0
"""Age of an attempt that shows that a server is reachable again."""


@dataclass
class Run:
    """Attempt at a task in this gateway.

    Attributes:
        task: The task as it was taken.
        work: The attempt.
        is_ending: Its end is being written, and can no longer be stopped.
        since: Time of its start by the monotonic clock.
    """

    task: StoredTask
    work: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    is_ending: bool = False
    since: float = field(default_factory=time.monotonic)


class Lane:
    """Tasks of one kind in this gateway.

    Args:
        kind: The kind.
        servers: Number of servers.
    """

    def __init__(self, kind: Kind, servers: int) -> None:
        self.kind = kind
        self.runs: dict[str, Run] = {}
        """Attempts by their ids: a task that goes back into the queue may come again before its attempt has ended."""
        self._concurrency = Concurrency(None, servers)
        self._paused_until = 0.0
        self._failures = 0

    def room(self) -> int:
        """Return the number of tasks that may start now."""
        now = time.monotonic()
        if now < self._paused_until:
            return 0
        if self._failures and not any(now - run.since > TRIAL_S for run in self.runs.values()):
            return 0 if self.runs else 1
        return max(0, self._concurrency.limit - len(self.runs))

    def add(self, task: StoredTask, work: Callable[[Lane, Run], Coroutine[Any, Any, None]]) -> None:
        """Begin an attempt."""
        run = self.runs[task.attempt_id] = Run(task)
        run.work = asyncio.ensure_future(work(self, run))

    def completed(self) -> None:
        """Note an answer."""
        self._failures = 0
        self._concurrency.completed(len(self.runs))

    def refused(self, error: GenServeError | OSError) -> None:
        """Note that a task has to go back into the queue, and start no further one for a while."""
        pause_s = getattr(error, "retry_after", None) or FULL_PAUSE_S
        if isinstance(error, (ServerUnavailable, OSError)):
            longest = min(FIRST_PAUSE_S * 2 ** min(self._failures, 10), LONGEST_PAUSE_S)
            pause_s = random.uniform(longest / 2, longest)  # noqa: S311  # not security-relevant
            self._failures += 1
        else:
            self._concurrency.refused(len(self.runs) - 1)
        self._paused_until = time.monotonic() + pause_s
