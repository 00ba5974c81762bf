"""Runner of the durable tasks: it takes them from the store, has the servers do them, and writes their results."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from genserve.aio import AsyncClient
from genserve.errors import Cancelled, DeadlineExceeded, GenServeError, QueueFull, ServerUnavailable
from genserve.gateway.database import StoreUnavailable
from genserve.gateway.files import ResultFiles
from genserve.gateway.lane import Lane, Run
from genserve.gateway.logs import log
from genserve.gateway.loop import Loop, end
from genserve.gateway.records import KINDS, Outcome, StoredTask
from genserve.gateway.store import LATE, Store
from genserve.types import TaskStatus

POLL_S = 2.0
"""Seconds between two looks for tasks that other gateways have accepted or given up."""
BEAT_S = 3.0
"""Seconds between two renewals of the leases, a fifth of a lease."""
LOOK_S = 1.5
"""Longest wait for a task's progress on its server."""
FRESH_S = 0.3
"""Age up to which a look at a task's progress serves further viewers."""
FINISH_PAUSE_S = 1.0
"""Seconds before a result is written again if the database is not available."""
LAST_S = 0.05
"""Seconds before a task's deadline in which it is not tried again."""
COUNT_S = 3.0
"""Longest wait for the number of servers."""

logger = logging.getLogger(__name__)


class Runner:
    """Runner of one gateway.

    Args:
        store: The tasks.
        files: The images.
        client: Client of the servers.
        keep_s: Seconds that an image is kept.
        on_end: Function that is called when a task has ended.
    """

    def __init__(
        self, store: Store, files: ResultFiles, client: AsyncClient, *, keep_s: float, on_end: Callable[[], object]
    ) -> None:
        self.id = secrets.token_hex(8)
        self._store = store
        self._files = files
        self._client = client
        self._keep_s = keep_s
        self._on_end = on_end
        self._lanes: list[Lane] = []
        self._loops: list[Loop] = []
        self._looks: dict[str, asyncio.Task[TaskStatus | None]] = {}
        self._farewells: set[asyncio.Task[None]] = set()
        self._starting: asyncio.Task[None] | None = None
        self._beating = Loop(self._beat, BEAT_S)

    def start(self) -> None:
        """Start to run tasks."""
        self._starting = asyncio.ensure_future(self._start())

    def wake(self) -> None:
        """Look for tasks at once: one has been accepted."""
        for loop in self._loops:
            loop.wake()

    async def stop(self) -> None:
        """Give up all attempts, and put their tasks back into the queue for other gateways."""
        if self._starting:
            await end([self._starting])
        for loop in (*self._loops, self._beating):
            await loop.stop()
        await end([run.work for lane in self._lanes for run in lane.runs.values()])
        await end([*self._looks.values(), *self._farewells])
        with suppress(StoreUnavailable):  # Their leases end.
            await self._store.release(self.id)

    def cancel(self, task: StoredTask) -> None:
        """Stop the present attempt at a task that has been cancelled, here or on a server."""
        if task.attempts and not self._give_up(task):
            farewell = asyncio.ensure_future(self._say_farewell(task.attempt_id))
            self._farewells.add(farewell)
            farewell.add_done_callback(self._farewells.discard)

    async def look(self, task: StoredTask) -> TaskStatus | None:
        """Return the progress of a running task on its server, None if no server tells. Viewers share one look."""
        key = task.attempt_id
        look = self._looks.get(key)
        if look is None:
            look = self._looks[key] = asyncio.ensure_future(self._ask(key))
            later = asyncio.get_running_loop().call_later
            look.add_done_callback(lambda _: later(FRESH_S, self._looks.pop, key, None))
        return await asyncio.shield(look)

    async def _start(self) -> None:
        try:
            servers = len(await asyncio.wait_for(self._client.status(), COUNT_S))
        except (GenServeError, asyncio.TimeoutError):
            servers = 1
        self._lanes = [Lane(kind, servers) for kind in KINDS]
        self._loops = [Loop(lambda lane=lane: self._fill(lane), POLL_S) for lane in self._lanes]  # type: ignore[misc]
        for loop in (*self._loops, self._beating):
            loop.start()

    async def _fill(self, lane: Lane) -> None:
        """Start as many tasks as there is room for."""
        if room := lane.room():
            for task in await self._store.take(lane.kind, room, self.id):
                lane.add(task, self._run)

    async def _run(self, lane: Lane, run: Run) -> None:
        """Run an attempt to its end."""
        task = run.task
        try:
            outcome = await self._outcome(lane, task)
            run.is_ending = True
            if outcome is None:
                with suppress(StoreUnavailable):  # Its lease ends.
                    await self._store.release(self.id, task)
            else:
                await self._finish(task, outcome)
        finally:
            lane.runs.pop(task.attempt_id, None)
            self.wake()

    async def _outcome(self, lane: Lane, task: StoredTask) -> Outcome | None:
        """Return the end of a task, None if it has to be tried again."""
        deadline = time.monotonic() + task.left_s
        try:
            outcome = Outcome("done", await self._result(task))
        except (ServerUnavailable, QueueFull, DeadlineExceeded, OSError) as error:
            if isinstance(error, OSError):
                log(logger, logging.ERROR, "an image cannot be written", task=task.id, error=error)
            if time.monotonic() < deadline - LAST_S:
                lane.refused(error)
                return None
            outcome = LATE
        except Cancelled as error:
            outcome = Outcome.of("cancelled", "Cancelled", str(error))
        except GenServeError as error:
            outcome = Outcome.of("failed", type(error).__name__, str(error))
        except Exception:
            logger.exception("a task failed", extra={"fields": {"task": task.id}})
            outcome = Outcome.of("failed", "ServerError", "the gateway could not run the task")
        lane.completed()
        return outcome

    async def _result(self, task: StoredTask) -> dict[str, Any]:
        call = {
            **task.arguments,
            "priority": task.priority,
            "timeout": max(task.left_s, LAST_S),
            "task_id": task.attempt_id,
        }
        if task.kind == "rerank":
            ranking = await self._client.rerank(**call)
            return {"ranking": [[each.index, each.score] for each in ranking], "info": ranking.info}
        image = await self._client.generate(**call)
        name = await self._files.save(image.data, task.arguments.get("format") or "png", self._keep_s)
        return {"seed": image.seed, "info": image.info, "file": name}

    async def _finish(self, task: StoredTask, outcome: Outcome) -> None:
        while True:
            try:
                accepted = await self._store.finish(task, outcome)
                break
            except StoreUnavailable:
                await asyncio.sleep(FINISH_PAUSE_S)
        if accepted:
            self._on_end()
        elif file := (outcome.result or {}).get("file"):  # The task was cancelled, or another gateway has it.
            await self._files.remove(file)

    async def _beat(self) -> None:
        """Renew the leases, write the progress, give up lost tasks, and reclaim those of others."""
        held = [run.task for lane in self._lanes for run in lane.runs.values()]
        if held:
            found = await asyncio.gather(*map(self._progress, held))
            kept = await self._store.renew(self.id, dict(zip((task.number for task in held), found, strict=True)))
            for task in held:
                if (task.number, task.attempts) not in kept:
                    self._give_up(task)
        if await self._store.reclaim():
            self._on_end()

    async def _progress(self, task: StoredTask) -> tuple[int, int]:
        status = await self.look(task) if task.kind == "image" else None
        return (status.step, status.steps) if status else (0, 0)

    async def _ask(self, attempt_id: str) -> TaskStatus | None:
        try:
            status = await asyncio.wait_for(self._client.task(attempt_id), LOOK_S)
        except (GenServeError, asyncio.TimeoutError):
            return None
        return status if status.is_in_flight else None

    async def _say_farewell(self, attempt_id: str) -> None:
        """Cancel an attempt of another gateway on its server, in case that gateway cannot."""
        with suppress(GenServeError, asyncio.TimeoutError):
            await asyncio.wait_for(self._client.cancel(attempt_id), LOOK_S)

    def _give_up(self, task: StoredTask) -> bool:
        """Stop an attempt of this gateway, and its work on the server; return False if there is none."""
        run = next((lane.runs[task.attempt_id] for lane in self._lanes if task.attempt_id in lane.runs), None)
        if run and not run.is_ending:
            run.work.cancel()
        return run is not None
