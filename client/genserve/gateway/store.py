"""Store of the durable tasks: a table that survives its gateways, and that several of them may share.

A task is run by the gateway that holds its lease. The lease ends with the gateway, and another one takes the task over.
Each taking counts as an attempt, and only the present attempt can end a task, so a task has exactly one result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import (
    URL,
    ColumnElement,
    Select,
    Update,
    and_,
    bindparam,
    case,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.sql.dml import ReturningInsert

from genserve.errors import InvalidInput, QueueFull
from genserve.gateway.database import Database, whole
from genserve.gateway.records import UNFINISHED, Kind, NewTask, Outcome, State, StoredTask
from genserve.gateway.table import TASKS, now

LEASE_S = 15.0
"""Seconds after which a task of a gateway that is silent goes to another one."""
SWEPT = 500
"""Expired tasks that are removed at once."""
LATE = Outcome.of("failed", "DeadlineExceeded", "the task was not done before its deadline")

columns = TASKS.c
EVERYTHING = (*columns, (columns.deadline - now()).label("left_s"))
BRIEFLY = tuple(
    case((columns.kind == "image", columns.arguments), else_="{}").label("arguments")
    if each is columns.arguments
    else each
    for each in EVERYTHING
)
"""All columns, without the arguments of tasks with documents."""


class KeyReused(InvalidInput):
    """Other request under the idempotency key of an earlier one."""


class Store(Database):
    """Store of tasks.

    Args:
        url: Address of the database, with its asynchronous driver.
        keep_s: Seconds that a finished task is kept.
        max_unfinished: Limit on the tasks that are queued or running.

    Raises:
        OSError: The folder of the database cannot be created.
    """

    def __init__(self, url: URL, *, keep_s: float, max_unfinished: int) -> None:
        super().__init__(url)
        self._keep_s = keep_s
        self._max_unfinished = max_unfinished

    @whole
    async def add(self, task: NewTask) -> StoredTask:
        """Accept a task, or return the earlier one under its idempotency key.

        Raises:
            QueueFull: Too many tasks are unfinished.
            KeyReused: The idempotency key belongs to another request.
        """
        if earlier := await self._earlier(task):
            return earlier
        try:
            rows = await self._rows(self._insertion(task))
        except IntegrityError:
            if earlier := await self._earlier(task):  # accepted at the same moment
                return earlier
            raise
        if not rows:
            raise QueueFull(f"{self._max_unfinished:,} tasks are unfinished, and no more are allowed")
        return rows[0]

    @whole
    async def get(self, task_id: str, owner: str) -> StoredTask | None:
        """Return a task, None if there is none with this id and owner."""
        return await self._one(_selected(columns.id == task_id, columns.owner == owner))

    @whole
    async def page(
        self, owner: str, *, limit: int, after: str | None = None, state: State | None = None
    ) -> list[StoredTask]:
        """Return an owner's tasks, the newest first. Those with documents, which may be large, come without arguments.

        Args:
            owner: The owner.
            limit: Number of tasks.
            after: Id of the task after which the page begins.
            state: The only state to return.
        """
        chosen = select(*BRIEFLY).where(columns.owner == owner)
        if state:
            chosen = chosen.where(columns.state == state)
        if after:
            before = select(columns.number).where(columns.id == after, columns.owner == owner).scalar_subquery()
            chosen = chosen.where(columns.number < before)
        return await self._rows(chosen.order_by(columns.number.desc()).limit(limit))

    @whole
    async def position(self, task: StoredTask) -> int:
        """Return the place of a queued task among those of its kind, from 1."""
        is_ahead = or_(columns.rank < task.rank, and_(columns.rank == task.rank, columns.number <= task.number))
        chosen = select(func.count()).where(columns.state == "queued", columns.kind == task.kind, is_ahead)
        async with self.engine.connect() as connection:
            return max(1, (await connection.execute(chosen)).scalar_one())

    @whole
    async def take(self, kind: Kind, count: int, runner: str) -> list[StoredTask]:
        """Give a runner the lease of up to `count` queued tasks, the most urgent and then the oldest ones."""
        first = (
            select(columns.number)
            .where(columns.state == "queued", columns.kind == kind, columns.deadline > now())
            .order_by(columns.rank, columns.number)
            .limit(count)
            .with_for_update(skip_locked=True)  # in PostgreSQL; SQLite has one writer at a time
            .cte()
        )
        statement = (
            update(TASKS)
            .where(columns.number.in_(select(first.c.number)))
            .values(
                state="running",
                runner=runner,
                lease_until=now() + LEASE_S,
                attempts=columns.attempts + 1,
                started=func.coalesce(columns.started, now()),
                step=0,
                steps=0,
            )
        )
        taken = await self._rows(statement.returning(*EVERYTHING))
        return sorted(taken, key=lambda task: (task.rank, task.number))

    @whole
    async def renew(self, runner: str, progress: Mapping[int, tuple[int, int]]) -> set[tuple[int, int]]:
        """Renew the leases of a runner and write the progress of its tasks; return those that it still has.

        Args:
            runner: The runner.
            progress: Finished and total steps, by the task's number.

        Returns:
            Number and attempt of each task.
        """
        # What `reclaim` has put back, as after a failure of the database, is still the runner's until it is taken.
        is_held = and_(columns.runner == runner, _is_unfinished())
        steps = [{"key": number, "now_at": step, "of": total} for number, (step, total) in progress.items() if total]
        written = (
            update(TASKS)
            .where(columns.number == bindparam("key"), columns.runner == runner)
            .values(step=bindparam("now_at"), steps=bindparam("of"))
        )
        renewed = (
            update(TASKS)
            .where(columns.number.in_(list(progress)), is_held)
            .values(state="running", lease_until=now() + LEASE_S)
            .returning(columns.number, columns.attempts)
        )
        async with self.engine.begin() as connection:
            if steps:
                await connection.execute(written, steps)
            return {(number, attempt) for number, attempt in await connection.execute(renewed)}

    @whole
    async def finish(self, task: StoredTask, outcome: Outcome) -> bool:
        """End a task with the outcome of its present attempt. Return False if the task is no longer that attempt's."""
        is_present = and_(_is_unfinished(), columns.attempts == task.attempts)
        steps = int((outcome.result or {}).get("info", {}).get("steps", task.steps))
        values = {"step": steps, "steps": steps} if outcome.state == "done" else {}
        statement = (
            update(TASKS).where(columns.number == task.number, is_present).values(**values, **self._end(outcome))
        )
        return await self._count(statement) == 1

    @whole
    async def cancel(self, task: StoredTask) -> bool:
        """Cancel a task. Return False if it has ended already."""
        ending = self._end(Outcome.of("cancelled", "Cancelled", "cancelled by the caller"))
        statement = update(TASKS).where(columns.number == task.number, _is_unfinished()).values(**ending)
        return await self._count(statement) == 1

    @whole
    async def release(self, runner: str, task: StoredTask | None = None) -> None:
        """Put a task back into the queue, or all tasks of a runner, so that they run again at once."""
        statement = update(TASKS).where(columns.runner == runner, columns.state == "running")
        if task is not None:
            statement = statement.where(columns.number == task.number, columns.attempts == task.attempts)
        await self._count(statement.values(state="queued", runner=None, lease_until=None, step=0, steps=0))

    @whole
    async def reclaim(self) -> int:
        """Put tasks of silent runners back into the queue. End queued tasks that are late; return their number."""
        silent = update(TASKS).where(columns.state == "running", columns.lease_until < now())
        await self._count(silent.values(state="queued", lease_until=None, step=0, steps=0))
        late = update(TASKS).where(columns.state == "queued", columns.deadline <= now())
        return await self._count(late.values(**self._end(LATE)))

    @whole
    async def sweep(self) -> tuple[int, list[str]]:
        """Remove some of the tasks whose time is over; return their number, and the names of their files."""
        chosen = select(columns.number).where(columns.expires <= now()).limit(SWEPT)
        async with self.engine.begin() as connection:
            removed = await connection.execute(
                delete(TASKS).where(columns.number.in_(chosen)).returning(columns.kind, columns.result)
            )
            results = [json.loads(result) if result and kind == "image" else {} for kind, result in removed]
        return len(results), [result["file"] for result in results if result]

    @whole
    async def take_webhooks(self, count: int, pause_s: float) -> list[StoredTask]:
        """Return up to `count` tasks whose callers are to be told of the end. They come again after `pause_s`."""
        first = (
            select(columns.number)
            .where(columns.webhook_state == "pending", columns.webhook_next <= now())
            .order_by(columns.webhook_next)
            .limit(count)
            .with_for_update(skip_locked=True)
            .cte()
        )
        statement = update(TASKS).where(columns.number.in_(select(first.c.number)))
        attempts = columns.webhook_attempts + 1
        taken = statement.values(webhook_next=now() + pause_s, webhook_attempts=attempts)
        return await self._rows(taken.returning(*EVERYTHING))

    @whole
    async def settle_webhook(self, task: StoredTask, *, delivered: bool, pause_s: float | None = None) -> None:
        """Note the result of an attempt to tell a caller.

        Args:
            task: The task as it was taken.
            delivered: The caller has been told.
            pause_s: Seconds to the next attempt; None gives up.
        """
        state = "delivered" if delivered else "failed" if pause_s is None else "pending"
        is_present = columns.webhook_attempts == task.webhook_attempts
        statement = update(TASKS).where(columns.number == task.number, is_present)
        await self._count(statement.values(webhook_state=state, webhook_next=now() + (pause_s or 0.0)))

    def _end(self, outcome: Outcome) -> dict[str, Any]:
        """Return the columns of a task that ends now."""
        return {
            "state": outcome.state,
            "result": json.dumps(outcome.result) if outcome.result else None,
            "error": json.dumps(outcome.error) if outcome.error else None,
            "ended": now(),
            "expires": now() + self._keep_s,
            "runner": None,
            "lease_until": None,
            "webhook_state": case((columns.webhook_url.is_not(None), "pending")),
            "webhook_next": now(),
        }

    def _insertion(self, task: NewTask) -> ReturningInsert[Any]:
        """Return a statement that inserts nothing if too many tasks are unfinished.

        It is one statement, so that callers at the same time cannot all pass the limit.
        """
        values = {
            columns.id: task.id,
            columns.owner: task.owner,
            columns.idempotency_key: task.idempotency_key,
            columns.fingerprint: task.fingerprint,
            columns.kind: task.kind,
            columns.priority: task.priority,
            columns.arguments: json.dumps(task.arguments),
            columns.state: "queued",
            columns.step: 0,
            columns.steps: 0,
            columns.attempts: 0,
            columns.webhook_url: task.webhook_url,
            columns.webhook_attempts: 0,
        }
        times = {
            columns.rank: now() + task.handicap_s,
            columns.accepted: now(),
            columns.deadline: now() + task.timeout_s,
        }
        constants = [literal(value, column.type) for column, value in values.items()]
        unfinished = select(func.count()).where(_is_unfinished()).scalar_subquery()
        chosen = select(*constants, *times.values()).where(unfinished < self._max_unfinished)
        return insert(TASKS).from_select([*values, *times], chosen).returning(*EVERYTHING)

    async def _earlier(self, task: NewTask) -> StoredTask | None:
        if task.idempotency_key is None:
            return None
        is_same_key = columns.idempotency_key == task.idempotency_key
        earlier = await self._one(_selected(columns.owner == task.owner, is_same_key))
        if earlier and earlier.fingerprint != task.fingerprint:
            raise KeyReused("the Idempotency-Key belongs to another request; allowed: a new key for each request")
        return earlier

    async def _one(self, statement: Select[Any]) -> StoredTask | None:
        return next(iter(await self._rows(statement)), None)

    async def _count(self, statement: Update) -> int:
        """Return the number of rows that a statement has changed."""
        async with self.engine.begin() as connection:
            return (await connection.execute(statement)).rowcount

    async def _rows(self, statement: Any) -> list[StoredTask]:
        async with self.engine.begin() as connection:
            return [StoredTask.of(row) for row in (await connection.execute(statement)).mappings()]


def _selected(*conditions: ColumnElement[bool]) -> Select[Any]:
    return select(*EVERYTHING).where(*conditions)


def _is_unfinished() -> ColumnElement[bool]:
    return columns.state.in_(UNFINISHED)
