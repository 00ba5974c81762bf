"""The store of durable tasks, on SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import postgresql
import pytest
from sqlalchemy import text

from genserve import QueueFull
from genserve.gateway import database
from genserve.gateway.database import StoreUnavailable, database_url, default_url
from genserve.gateway.records import AGING_S, Kind, NewTask, Outcome, StoredTask, fingerprint
from genserve.gateway.store import KeyReused, Store

DONE = Outcome("done", {"seed": 1, "info": {"steps": 4}, "file": "f"})
FAILED = Outcome.of("failed", "ServerError", "broken")
Use = Callable[[Store], Awaitable[None]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a database in PostgreSQL."""
    if reason := postgresql.missing():
        pytest.skip(reason)
    with postgresql.postgresql(tmp_path_factory.mktemp("postgresql")) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'tasks.db'}"
    address: str = request.getfixturevalue("server")

    async def clear() -> None:
        engine = database.new_engine(database_url(address))
        async with engine.begin() as connection:
            await connection.execute(text("DROP TABLE IF EXISTS genserve_tasks"))
        await engine.dispose()

    asyncio.run(clear())
    return address


def opened(url: str, **options: Any) -> Store:
    return Store(database_url(url), **{"keep_s": 60.0, "max_unfinished": 1000, **options})


def with_store(url: str, use: Use, **options: Any) -> None:
    async def run() -> None:
        tasks = opened(url, **options)
        await tasks.open()
        try:
            await use(tasks)
        finally:
            await tasks.close()

    asyncio.run(run())


def new(prompt: str = "x", kind: Kind = "image", **options: Any) -> NewTask:
    values = {"owner": "", "timeout_s": 1000.0, "fingerprint": fingerprint({"prompt": prompt}), **options}
    return NewTask(kind, {"prompt": prompt}, **values)


async def execute(tasks: Store, statement: str, **values: Any) -> None:
    async with tasks.engine.begin() as connection:
        await connection.execute(text(statement), values)


def prompts(tasks: list[StoredTask]) -> list[str]:
    return [task.arguments["prompt"] for task in tasks]


def test_accepted_task_outlives_its_gateway(url: str) -> None:
    ids = []

    async def accept(tasks: Store) -> None:
        ids.append((await tasks.add(new("a circle", owner="alice", webhook_url="https://example.org"))).id)

    async def find(tasks: Store) -> None:
        task = await tasks.get(ids[0], "alice")
        assert task is not None
        assert (task.state, task.arguments, task.webhook_url) == (
            "queued",
            {"prompt": "a circle"},
            "https://example.org",
        )
        assert abs(task.accepted - time.time()) < 60
        assert 990 < task.left_s <= 1000
        assert await tasks.get(ids[0], "bob") is None

    with_store(url, accept)
    with_store(url, find)


def test_idempotency_key_gives_the_same_task_to_its_owner(url: str) -> None:
    async def use(tasks: Store) -> None:
        same = await asyncio.gather(*(tasks.add(new(idempotency_key="k")) for _ in range(10)))
        assert len({task.id for task in same}) == 1
        other = await tasks.add(new(idempotency_key="k", owner="bob"))
        assert other.id != same[0].id
        with pytest.raises(KeyReused):
            await tasks.add(new("y", idempotency_key="k"))
        assert len({(await tasks.add(new())).id for _ in range(3)}) == 3

    with_store(url, use)


def test_unfinished_tasks_are_limited(tmp_path: Path) -> None:
    async def use(tasks: Store) -> None:
        answers = await asyncio.gather(*(tasks.add(new()) for _ in range(30)), return_exceptions=True)
        assert sum(isinstance(answer, StoredTask) for answer in answers) == 5
        assert sum(isinstance(answer, QueueFull) for answer in answers) == 25
        (task,) = await tasks.take("image", 1, "me")
        assert await tasks.finish(task, DONE)
        await tasks.add(new())

    with_store(f"sqlite:///{tmp_path / 'tasks.db'}", use, max_unfinished=5)


def test_tasks_are_taken_by_priority_and_age(url: str) -> None:
    async def use(tasks: Store) -> None:
        for prompt, priority in (("low", "low"), ("first", "normal"), ("second", "normal"), ("high", "high")):
            await tasks.add(new(prompt, priority=priority))
        await tasks.add(new("ranking", "rerank"))
        await age(tasks, "low", 2 * AGING_S + 60)
        assert prompts(await tasks.take("image", 3, "me")) == ["low", "high", "first"]
        assert prompts(await tasks.take("image", 3, "me")) == ["second"]
        assert prompts(await tasks.take("rerank", 3, "me")) == ["ranking"]

    with_store(url, use)


async def age(tasks: Store, prompt: str, seconds: float) -> None:
    """Let a task be older than it is."""
    statement = "UPDATE genserve_tasks SET rank = rank - :seconds WHERE arguments = :arguments"
    await execute(tasks, statement, seconds=seconds, arguments=f'{{"prompt": "{prompt}"}}')


def test_position_counts_the_tasks_ahead_of_the_same_kind(url: str) -> None:
    async def use(tasks: Store) -> None:
        await tasks.add(new("ranking", "rerank"))
        first, second = await tasks.add(new("first")), await tasks.add(new("second"))
        urgent = await tasks.add(new("urgent", priority="high"))
        assert [await tasks.position(task) for task in (urgent, first, second)] == [1, 2, 3]
        await tasks.take("image", 1, "me")
        assert [await tasks.position(task) for task in (first, second)] == [1, 2]

    with_store(url, use)


def test_no_task_is_taken_by_two_gateways(url: str) -> None:
    async def use(tasks: Store) -> None:
        for number in range(60):
            await tasks.add(new(str(number)))
        other = opened(url)
        runners = [(tasks, "a"), (other, "b"), (tasks, "c"), (other, "d")]
        taken = await asyncio.gather(*(each.take("image", 4, name) for _ in range(5) for each, name in runners))
        await other.close()
        found = [prompt for tasks in taken for prompt in prompts(tasks)]
        assert sorted(found, key=int) == [str(number) for number in range(60)]

    with_store(url, use)


async def expire(tasks: Store) -> None:
    """Let all leases be over."""
    await execute(tasks, "UPDATE genserve_tasks SET lease_until = 1 WHERE state = 'running'")


def test_task_of_a_silent_gateway_is_taken_over_and_has_one_result(url: str) -> None:
    async def use(tasks: Store) -> None:
        task = await tasks.add(new())
        (first,) = await tasks.take("image", 1, "dead")
        assert await tasks.reclaim() == 0
        assert await tasks.take("image", 1, "early") == []
        await expire(tasks)
        assert await tasks.reclaim() == 0
        (second,) = await tasks.take("image", 1, "alive")
        assert (first.attempt_id, second.attempt_id) == (f"{task.id}-1", f"{task.id}-2")
        assert await tasks.take("image", 1, "late") == []
        assert not await tasks.finish(first, FAILED)
        assert await tasks.finish(second, DONE)
        assert not await tasks.finish(second, FAILED)
        found = await tasks.get(task.id, "")
        assert found is not None
        assert (found.state, found.result, found.error, found.step) == ("done", DONE.result, None, 4)

    with_store(url, use)


def test_silent_gateway_keeps_what_nobody_has_taken(url: str) -> None:
    """As all gateways are silent while the database is not available."""

    async def use(tasks: Store) -> None:
        for prompt in ("a", "b", "c"):
            await tasks.add(new(prompt))
        a, b, c = await tasks.take("image", 3, "me")
        await expire(tasks)
        await tasks.reclaim()
        (other,) = await tasks.take("image", 1, "you")
        assert other.id == a.id
        assert await tasks.renew("me", {task.number: (0, 0) for task in (a, b)}) == {(b.number, 1)}
        assert await tasks.finish(c, DONE)
        assert await tasks.take("image", 9, "late") == []

    with_store(url, use)


def test_renewal_keeps_leases_writes_progress_and_tells_what_is_lost(url: str) -> None:
    async def use(tasks: Store) -> None:
        for prompt in ("kept", "cancelled", "released", "of another"):
            await tasks.add(new(prompt))
        kept, cancelled, released = await tasks.take("image", 3, "me")
        (foreign,) = await tasks.take("image", 1, "you")
        assert await tasks.cancel(cancelled)
        await tasks.release("me", released)
        await expire(tasks)
        progress = {task.number: (3, 8) for task in (kept, cancelled, released, foreign)}
        assert await tasks.renew("me", progress) == {(kept.number, 1)}
        await tasks.reclaim()
        assert prompts(await tasks.take("image", 9, "late")) == ["released", "of another"]
        found = [await tasks.get(task.id, "") for task in (kept, cancelled, released, foreign)]
        assert [(task.step, task.steps) for task in found if task] == [(3, 8), (0, 0), (0, 0), (0, 0)]

    with_store(url, use)


def test_released_tasks_run_again_at_once(url: str) -> None:
    async def use(tasks: Store) -> None:
        for prompt in ("a", "b", "c"):
            await tasks.add(new(prompt))
        a, _, _ = await tasks.take("image", 3, "me")
        await tasks.release("me", a)
        assert prompts(await tasks.take("image", 3, "you")) == ["a"]
        await tasks.release("me", a)  # The attempt is another one's now.
        assert await tasks.take("image", 3, "late") == []
        await tasks.release("me")
        assert prompts(await tasks.take("image", 3, "late")) == ["b", "c"]

    with_store(url, use)


def test_cancelled_task_stays_so(url: str) -> None:
    async def use(tasks: Store) -> None:
        queued, running = await tasks.add(new("queued")), await tasks.add(new("running", priority="high"))
        (taken,) = await tasks.take("image", 1, "me")
        assert [await tasks.cancel(task) for task in (queued, running, running)] == [True, True, False]
        assert not await tasks.finish(taken, DONE)
        found = [await tasks.get(task.id, "") for task in (queued, running)]
        assert [(task.state, task.result) for task in found if task] == [("cancelled", None)] * 2
        assert await tasks.take("image", 9, "you") == []

    with_store(url, use)


def test_late_tasks_fail_unless_they_run(url: str) -> None:
    async def use(tasks: Store) -> None:
        running = await tasks.add(new("running"))
        await tasks.take("image", 1, "me")
        waiting = await tasks.add(new("waiting"))
        await execute(tasks, "UPDATE genserve_tasks SET deadline = 1")
        await tasks.add(new("in time"))
        assert prompts(await tasks.take("image", 9, "you")) == ["in time"]
        assert await tasks.reclaim() == 1
        found = [await tasks.get(task.id, "") for task in (running, waiting)]
        assert [(task.state, (task.error or {}).get("class")) for task in found if task] == [
            ("running", None),
            ("failed", "DeadlineExceeded"),
        ]

    with_store(url, use)


def test_finished_tasks_are_swept_after_their_time(url: str) -> None:
    async def use(tasks: Store) -> None:
        await tasks.add(new("unfinished"))
        await tasks.add(new("finished", priority="high"))
        (task,) = await tasks.take("image", 1, "me")
        await tasks.finish(task, DONE)
        await tasks.add(new("ranking", "rerank"))
        (ranking,) = await tasks.take("rerank", 1, "me")
        await tasks.finish(ranking, Outcome("done", {"ranking": [[0, 1.0]], "info": {}}))
        assert await tasks.sweep() == (0, [])
        await execute(tasks, "UPDATE genserve_tasks SET expires = expires - 50")
        assert await tasks.sweep() == (0, [])
        await execute(tasks, "UPDATE genserve_tasks SET expires = expires - 10")
        assert await tasks.sweep() == (2, ["f"])
        assert prompts(await tasks.page("", limit=9)) == ["unfinished"]

    with_store(url, use)


def test_pages_show_the_newest_of_one_owner_first(url: str) -> None:
    async def use(tasks: Store) -> None:
        for number in range(5):
            await tasks.add(new(str(number), owner="alice"))
            await tasks.add(new("foreign", owner="bob"))
        first = await tasks.page("alice", limit=3)
        assert prompts(first) == ["4", "3", "2"]
        await tasks.add(new("5", owner="alice"))
        assert prompts(await tasks.page("alice", limit=3, after=first[-1].id)) == ["1", "0"]
        await tasks.take("image", 1, "me")
        assert prompts(await tasks.page("alice", limit=9, state="running")) == ["0"]
        await tasks.add(new("with documents", "rerank", owner="carol"))
        assert [task.arguments for task in await tasks.page("carol", limit=9)] == [{}]
        assert await tasks.page("bob", limit=9, after=first[-1].id) == []

    with_store(url, use)


def test_webhooks_come_again_until_they_are_settled(url: str) -> None:
    async def use(tasks: Store) -> None:
        await tasks.add(new("without"))
        await tasks.add(new("with", webhook_url="https://example.org"))
        assert await tasks.take_webhooks(9, 60.0) == []
        for task in await tasks.take("image", 2, "me"):
            await tasks.finish(task, DONE)
        (lost,) = await tasks.take_webhooks(9, -1.0)
        (again,) = await tasks.take_webhooks(9, 60.0)
        assert (lost.id, lost.webhook_attempts, again.webhook_attempts) == (again.id, 1, 2)
        assert await tasks.take_webhooks(9, 60.0) == []
        await tasks.settle_webhook(lost, delivered=True)  # no longer the present attempt
        await tasks.settle_webhook(again, delivered=False, pause_s=-1.0)
        (third,) = await tasks.take_webhooks(9, -1.0)
        await tasks.settle_webhook(third, delivered=True)
        assert await tasks.take_webhooks(9, 60.0) == []
        found = await tasks.get(third.id, "")
        assert found is not None
        assert (found.webhook_state, found.webhook_attempts) == ("delivered", 3)

    with_store(url, use)


def test_gateways_may_start_at_once(url: str) -> None:
    async def run() -> None:
        stores = [opened(url) for _ in range(4)]
        await asyncio.gather(*(each.open() for each in stores))
        await stores[0].add(new())
        assert prompts(await stores[1].page("", limit=9)) == ["x"]
        for each in stores:
            await each.close()

    asyncio.run(run())


def test_call_whose_caller_is_cancelled_ends_as_a_whole(url: str) -> None:
    async def use(tasks: Store) -> None:
        for number in range(20):
            call = asyncio.ensure_future(tasks.add(new(str(number))))
            for _ in range(number):
                await asyncio.sleep(0)
            call.cancel()
        while tasks.pending:
            await asyncio.sleep(0.01)
        assert sorted(prompts(await tasks.page("", limit=99)), key=int) == [str(number) for number in range(1, 20)]

    with_store(url, use)


def test_lost_database_is_reported_and_found_again(url: str, caplog: pytest.LogCaptureFixture) -> None:
    async def use(tasks: Store) -> None:
        await execute(tasks, "ALTER TABLE genserve_tasks RENAME TO hidden")
        for _ in range(3):
            with pytest.raises(StoreUnavailable):
                await tasks.add(new("secret words"))
        await execute(tasks, "ALTER TABLE hidden RENAME TO genserve_tasks")
        await tasks.add(new())

    with_store(url, use)
    events = [record.getMessage() for record in caplog.records if record.name == database.__name__]
    assert events == ["the database of the tasks failed", "the database of the tasks is available again"]
    assert "secret words" not in caplog.text


def test_sqlite_writes_ahead_and_to_the_disk(tmp_path: Path) -> None:
    async def use(tasks: Store) -> None:
        async with tasks.engine.connect() as connection:
            assert (await connection.execute(text("PRAGMA journal_mode"))).scalar_one() == "wal"
            assert (await connection.execute(text("PRAGMA synchronous"))).scalar_one() == 2

    with_store(f"sqlite:///{tmp_path / 'below' / 'tasks.db'}", use)
    assert (tmp_path / "below").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("given", "driver"),
    [
        ("sqlite:///x.db", "sqlite+aiosqlite"),
        ("sqlite+aiosqlite:////x.db", "sqlite+aiosqlite"),
        ("postgresql://u:p@h/n", "postgresql+asyncpg"),
        ("postgres://u:p@h/n", "postgresql+asyncpg"),
        ("postgresql+asyncpg://u:p@h/n?sslmode=require", "postgresql+asyncpg"),
    ],
)
def test_short_forms_of_addresses_get_their_driver(given: str, driver: str) -> None:
    url = database_url(given)
    assert url.drivername == driver
    assert "sslmode" not in url.query


@pytest.mark.parametrize(
    "given", ["", "tasks.db", "mysql://u:hidden@h/n", "sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory"]
)
def test_unusable_addresses_are_refused_in_one_line(given: str) -> None:
    with pytest.raises(ValueError, match="allowed: sqlite:///PATH") as refusal:
        database_url(given)
    assert "hidden" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_postgresql_without_its_driver_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"asyncpg is not installed; .*pip install 'genserve\[postgresql\]'"):
        database_url("postgresql://u:p@h/n")


def test_unreachable_database_is_an_error_without_the_password() -> None:
    async def run() -> None:
        tasks = opened("postgresql://genserve:hidden@127.0.0.1:1/x")
        try:
            with pytest.raises(StoreUnavailable) as refusal:
                await tasks.open()
        finally:
            await tasks.close()
        assert "hidden" not in str(refusal.value)

    asyncio.run(run())


def test_missing_database_is_an_error_in_one_line(server: str) -> None:
    async def run() -> None:
        tasks = opened(server.replace("/postgres", "/missing"))
        with pytest.raises(StoreUnavailable, match='database "missing" does not exist') as refusal:
            await tasks.open()
        await tasks.close()
        assert "\n" not in str(refusal.value)

    asyncio.run(run())


def test_default_is_a_file_per_port_in_the_state_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GENSERVE_STATE_DIR", str(tmp_path))
    assert database_url(default_url(12411)).database == str(tmp_path / "gateway-12411" / "tasks.db")
    monkeypatch.delenv("GENSERVE_STATE_DIR")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert database_url(default_url(1)).database == str(tmp_path / "genserve" / "gateway-1" / "tasks.db")
