"""Places in the queue, as far as a gateway sees them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count

from genserve.aio import AsyncClient
from genserve.errors import GenServeError
from genserve.handles import POLL_S, AsyncTask
from genserve.types import Priority, TaskStatus

MODEL = "flux"
RANKS: dict[Priority, int] = {"high": 0, "normal": 1, "low": 2}
LISTED_S = 1.0
"""Age in seconds at which the list of the servers' tasks is asked for again, while somebody wants to know a place."""


@dataclass(order=True)
class Waiting:
    """Image request of this gateway; they are served in this order, as far as they share a server.

    Attributes:
        rank: Rank of its priority; 0 is served first.
        number: Order of arrival.
        task_id: Its id.
    """

    rank: int
    number: int
    task_id: str = field(compare=False)


class Line:
    """Image requests of a gateway. Those of others in Triton's own queue cannot be seen.

    Args:
        client: The client that lists the servers' tasks.
    """

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._waiting: dict[int, Waiting] = {}
        self._numbers = count()
        self._listed: list[TaskStatus] = []
        self._listed_at = float("-inf")
        self._lock = asyncio.Lock()

    @contextmanager
    def standing(self, task_id: str, priority: Priority) -> Iterator[Waiting]:
        """Count a request for the length of the block."""
        waiting = Waiting(RANKS[priority], next(self._numbers), task_id)
        self._waiting[waiting.number] = waiting
        try:
            yield waiting
        finally:
            del self._waiting[waiting.number]

    def unlisted(self, listed: Collection[str]) -> int:
        """Return how many of the requests are not among the ids that the servers list: those in Triton's own queue."""
        return sum(waiting.task_id not in listed for waiting in self._waiting.values())

    async def follow(self, task: AsyncTask, priority: Priority) -> AsyncIterator[tuple[TaskStatus, int | None]]:
        """Yield the status and the place of a task at every change until it ends; 1 is next, None is not waiting.

        Raises:
            GenServeError: The task failed.
        """
        before: tuple[TaskStatus, int | None] | None = None
        with self.standing(task.id, priority) as waiting:
            while not await _ended(task):
                status = await task.progress()
                place = await self._place(waiting) if status.state == "waiting" else None
                if (status, place) != before:
                    yield status, place
                before = status, place

    async def _place(self, waiting: Waiting) -> int:
        listed = await self._list()
        mine = next((task for task in listed if task.task_id == waiting.task_id), None)
        ahead = [task for task in listed if task.state == "waiting"]
        if mine:
            return 1 + sum((task.arrived or 0.0) < (mine.arrived or 0.0) for task in ahead)
        at_instances = {task.task_id for task in listed}
        between = [other for other in self._waiting.values() if other < waiting and other.task_id not in at_instances]
        return 1 + len(ahead) + len(between)

    async def _list(self) -> list[TaskStatus]:
        async with self._lock:
            if time.monotonic() - self._listed_at > LISTED_S:
                try:
                    servers = await self._client.status()
                except GenServeError:
                    servers = []
                self._listed = [task for server in servers for task in server.tasks if task.model == MODEL]
                self._listed_at = time.monotonic()
            return self._listed


async def _ended(task: AsyncTask) -> bool:
    """Wait a little; return whether the task is done. A request that is refused at once has then failed."""
    with suppress(TimeoutError):
        await task.result(POLL_S)
    return task.done()
