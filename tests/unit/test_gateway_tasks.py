"""Durable tasks: routes and events, and the runner before fake servers."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import pytest
from fake_servers import Answer, FakeServer, after, image, task
from gateway_app import gateway, with_gateway
from sqlalchemy import text

from genserve import DeadlineExceeded, InvalidInput, OutOfMemory, QueueFull, ServerError, ServerUnavailable
from genserve.concurrency import FIRST_PER_SERVER
from genserve.gateway import lane, runner, store, task_events
from genserve.gateway.database import database_url, new_engine
from genserve.gateway.durable import Tasks
from genserve.gateway.files import ResultFiles
from genserve.gateway.keys import digest_of
from genserve.gateway.lane import Lane, Run
from genserve.gateway.store import Store
from genserve.protocol import Call, Outputs

T = TypeVar("T")
Use = Callable[[httpx.AsyncClient], Awaitable[T]]
FINISHED = {"done", "failed", "cancelled"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((runner, "POLL_S"), (runner, "BEAT_S"), (task_events, "POLL_S"), (lane, "FULL_PAUSE_S")):
        monkeypatch.setattr(module, name, 0.05)
    monkeypatch.setattr(lane, "LONGEST_PAUSE_S", 0.1)


class Painter(FakeServer):
    """Server that reports progress and previews, and cancels on request."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.preview = b""

    async def infer(self, call: Call, timeout_s: float) -> Outputs:
        if call.model != "tasks":
            try:
                return await asyncio.wait_for(super().infer(call, timeout_s), timeout_s)
            except asyncio.TimeoutError:
                raise DeadlineExceeded("the server has no more time") from None
        action, task_id = (call.inputs[name].item().decode() for name in ("ACTION", "TASK_ID"))
        self.tasks.append((action, task_id))
        if not self.steps:
            return task(task_id)
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        answer = task(task_id, "running", step=step, steps=4)
        answer["PREVIEW"] = np.array([self.preview], dtype=np.object_)
        return answer

    @property
    def cancelled(self) -> list[str]:
        return [task_id for action, task_id in self.tasks if action == "cancel"]


def database(folder: Path) -> str:
    return f"sqlite:///{folder / 'tasks.db'}"


def ask(use: Use[T], folder: Path, *servers: FakeServer, **settings: Any) -> T:
    return with_gateway(use, *servers, tasks=database(folder), **settings)


async def submitted(http: httpx.AsyncClient, **options: Any) -> dict[str, Any]:
    answer = await http.post("/v1/tasks", **{"json": {"prompt": "a circle"}, **options})
    assert answer.status_code == 202, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def until(http: httpx.AsyncClient, task_id: str, *states: str, **options: Any) -> dict[str, Any]:
    """Return a task once it has one of the states; pytest's own limit ends a wait that is in vain."""
    while True:
        answer = await http.get(f"/v1/tasks/{task_id}", **options)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        if found["state"] in (states or FINISHED):
            return found
        await asyncio.sleep(0.02)


def seeds(server: FakeServer) -> list[int]:
    return [call.inputs["SEED"].item() for call in server.calls]


def results(folder: Path) -> list[str]:
    return [path.name for path in (folder / "results").glob("*")]


def test_image_is_accepted_and_generated(tmp_path: Path) -> None:
    server = FakeServer()

    async def use(http: httpx.AsyncClient) -> None:
        answer = await http.post("/v1/tasks", json={"prompt": "a circle", "steps": 4, "format": "webp"})
        accepted = answer.json()
        assert answer.status_code == 202
        assert answer.headers["location"] == f"/v1/tasks/{accepted['id']}"
        assert (accepted["kind"], accepted["state"], accepted["attempts"]) == ("image", "queued", 0)

        done = await until(http, accepted["id"])
        assert (done["state"], done["progress"], done["step"], done["error"]) == ("done", 1.0, 4, None)
        assert done["accepted_at"] <= done["started_at"] <= done["ended_at"] < done["expires_at"]
        assert done["request"] == {"prompt": "a circle", "steps": 4, "format": "webp", "seed": seeds(server)[0]}
        assert done["result"]["seed"] == seeds(server)[0]
        assert done["result"]["info"]["prompt"] == "a circle"
        assert "b64_json" not in done["result"]
        file = await http.get(done["result"]["url"])
        assert (file.content, file.headers["content-type"]) == (b"a circle", "image/webp")
        whole = (await http.get(f"/v1/tasks/{accepted['id']}?b64_json=true")).json()
        assert base64.b64decode(whole["result"]["b64_json"]) == b"a circle"

    ask(use, tmp_path, server)


def test_ranking_is_accepted_and_scored(tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient) -> None:
        body = {"query": "q", "documents": ["a", "abc", "ab"], "top_n": 2}
        done = await until(http, (await submitted(http, json=body))["id"])
        assert (done["kind"], done["state"], done["request"]["query"]) == ("rerank", "done", "q")
        assert done["result"]["ranking"] == [
            {"index": 1, "score": 3.0, "document": "abc"},
            {"index": 2, "score": 2.0, "document": "ab"},
        ]
        (listed,) = (await http.get("/v1/tasks")).json()["data"]
        assert listed["result"]["ranking"] == [{"index": 1, "score": 3.0}, {"index": 2, "score": 2.0}]
        assert listed["request"] == {}

    ask(use, tmp_path)


def test_second_attempt_has_the_seed_of_the_first(tmp_path: Path) -> None:
    server = FakeServer()
    server.script = [ServerUnavailable("gone"), QueueFull("full")]

    async def use(http: httpx.AsyncClient) -> None:
        done = await until(http, (await submitted(http))["id"])
        assert (done["state"], done["attempts"]) == ("done", 3)
        assert seeds(server) == [done["request"]["seed"]] * 3
        assert len({call.request_id for call in server.calls}) == 3

    ask(use, tmp_path, server)


def test_idempotency_key_gives_the_same_task(tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient) -> None:
        key = {"Idempotency-Key": "order 7"}
        first = await submitted(http, headers=key)
        await until(http, first["id"])
        again = await submitted(http, headers=key)
        assert (again["id"], again["state"], again["request"]) == (first["id"], "done", first["request"])
        other = await http.post("/v1/tasks", json={"prompt": "a square"}, headers=key)
        assert other.status_code == 422
        assert "Idempotency-Key" in other.json()["message"]
        for wrong in ("", "x" * 256):
            answer = await http.post("/v1/tasks", json={"prompt": "x"}, headers={"Idempotency-Key": wrong})
            assert answer.status_code == 400

    ask(use, tmp_path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"steps": 4}', "prompt"),
        ('{"prompt": ""}', "prompt"),
        ('{"prompt": 7}', "prompt"),
        ('{"prompt": "\\ud800"}', ""),
        ('{"prompt": "x", "step": 4}', "step"),
        ('{"prompt": "x", "\\ud800": 4}', ""),
        ('{"prompt": "x", "query": "x"}', "documents"),
        ('{"prompt": "x", "height": 1099511627776}', "HEIGHT cannot be sent as INT32"),
        ('{"prompt": "x", "height": "64"}', "height"),
        ('{"prompt": "x", "guidance": NaN}', ""),
        ('{"prompt": "x", "guidance": 1e999}', "finite"),
        ('{"prompt": "x", "seed": -1}', "seed"),
        ('{"prompt": "x", "seed": 9223372036854775808}', "seed"),
        ('{"prompt": "x", "format": "gif"}', "format"),
        ('{"prompt": "x", "priority": "urgent"}', "priority"),
        ('{"prompt": "x", "timeout": 0}', "timeout"),
        ('{"prompt": "x", "lora": [{"name": "\\udc00"}]}', ""),
        ('{"prompt": "x", "lora": [{"name": "a", "more": {}}]}', "more"),
        ('{"prompt": "x", "lora": {"a": 1e999}}', "finite"),
        ('{"prompt": "x", "cache": "0.1"}', "cache"),
        ('{"query": "x", "documents": []}', "documents"),
        ('{"query": "x", "documents": "abc"}', "documents"),
        ('{"query": "x", "documents": ["a", null]}', "documents"),
        ('{"query": "x", "documents": ["a"], "top_n": 0}', "top_n"),
        ("[]", "dictionary"),
        ("null", ""),
        ("{", ""),
    ],
)
def test_wrong_requests_are_refused_at_once(body: str, message: str, tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient) -> None:
        answer = await http.post("/v1/tasks", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, answer.text
        assert message in answer.json()["message"]
        assert (await http.get("/v1/tasks")).json()["data"] == []

    ask(use, tmp_path)


def test_adapters_and_cache_reach_the_server(tmp_path: Path) -> None:
    server = FakeServer()

    async def use(http: httpx.AsyncClient) -> None:
        accepted = await submitted(http, json={"prompt": "x", "lora": {"neon": 0.5}, "cache": 0.25})
        assert accepted["request"]["lora"] == [{"name": "neon", "weight": 0.5}]
        assert (await until(http, accepted["id"]))["state"] == "done"
        (call,) = server.calls
        assert call.inputs["LORA"].item() == b'[{"name": "neon", "weight": 0.5}]'
        assert call.inputs["CACHE"].item() == 0.25

    ask(use, tmp_path, server)


def test_tasks_belong_to_their_key(tmp_path: Path) -> None:
    alice, bob = {"x-api-key": "a"}, {"x-api-key": "b"}

    async def use(http: httpx.AsyncClient) -> None:
        same = {"Idempotency-Key": "same"}
        mine = await submitted(http, headers={**alice, **same})
        theirs = await submitted(http, headers={**bob, **same})
        assert mine["id"] != theirs["id"]
        for method, path in (("GET", ""), ("GET", "/events"), ("DELETE", "")):
            answer = await http.request(method, f"/v1/tasks/{mine['id']}{path}", headers=bob)
            assert answer.status_code == 404
        assert (await until(http, mine["id"], headers=alice))["state"] == "done"
        listed = (await http.get("/v1/tasks", headers=bob)).json()["data"]
        assert [each["id"] for each in listed] == [theirs["id"]]
        assert (await http.get("/v1/tasks")).status_code == 401

    ask(use, tmp_path, keys=f"alice {digest_of('a')}\nbob {digest_of('b')}")


def test_list_is_paged(tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient) -> None:
        ids = [(await submitted(http))["id"] for _ in range(5)]
        for task_id in ids:
            await until(http, task_id)
        first = (await http.get("/v1/tasks?limit=2&state=done")).json()
        assert [each["id"] for each in first["data"]] == [ids[4], ids[3]]
        rest = (await http.get(f"/v1/tasks?limit=3&after={first['next']}")).json()
        assert [each["id"] for each in rest["data"]] == [ids[2], ids[1], ids[0]]
        assert rest["next"] is None
        for query in ("limit=0", "limit=101", "limit=x", "after=nope", "after=%00", "state=lost"):
            assert (await http.get(f"/v1/tasks?{query}")).status_code == 400

    ask(use, tmp_path)


@pytest.mark.parametrize("task_id", ["0" * 32, "nope", "%00", "..%2f..%2fx", "0" * 31 + "'", "\u0660" * 32])
def test_unknown_tasks_are_not_found(task_id: str, tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient) -> None:
        for method, path in (("GET", ""), ("GET", "/events"), ("DELETE", "")):
            assert (await http.request(method, f"/v1/tasks/{task_id}{path}")).status_code == 404

    ask(use, tmp_path)


def test_cancellation_stops_the_work_and_may_be_repeated(tmp_path: Path) -> None:
    server = Painter()
    server.hung = True

    async def use(http: httpx.AsyncClient) -> None:
        running = (await submitted(http))["id"]
        await until(http, running, "running")
        others = [(await submitted(http))["id"] for _ in range(FIRST_PER_SERVER)]
        await until(http, others[0], "running")
        queued = await until(http, others[-1], "queued")
        assert queued["position"] == 1
        for task_id in (others[-1], running, others[-1], running):
            answer = await http.delete(f"/v1/tasks/{task_id}")
            assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
            assert answer.json()["error"] == {"class": "Cancelled", "message": "cancelled by the caller"}
        while server.running > 1:
            await asyncio.sleep(0.02)
        server.hung = False
        assert (await until(http, (await submitted(http))["id"]))["state"] == "done"
        assert f"{others[-1]}-1" not in {call.request_id for call in server.calls}

    ask(use, tmp_path, server)


def test_task_that_has_ended_is_not_cancelled(tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient) -> None:
        done = await until(http, (await submitted(http))["id"])
        answer = await http.delete(f"/v1/tasks/{done['id']}")
        assert (answer.status_code, answer.json()["state"]) == (200, "done")
        assert answer.json()["result"] == done["result"]

    ask(use, tmp_path)


def test_cancellation_reaches_the_gateway_that_runs_the_task(tmp_path: Path) -> None:
    """Also its server is told, by the gateway that was asked to cancel."""
    first, second = Painter(), Painter()
    first.hung = second.hung = True

    async def run() -> None:
        async with gateway(first, tasks=database(tmp_path)) as one:
            task_id = (await submitted(one))["id"]
            await until(one, task_id, "running")
            async with gateway(second, tasks=database(tmp_path)) as two:
                assert (await two.delete(f"/v1/tasks/{task_id}")).json()["state"] == "cancelled"
                while first.running or f"{task_id}-1" not in second.cancelled:
                    await asyncio.sleep(0.02)
            assert second.calls == []

    asyncio.run(run())


def test_stopped_gateway_hands_its_tasks_over_at_once(tmp_path: Path) -> None:
    first, second = FakeServer(), FakeServer()
    first.hung = True

    async def run() -> None:
        async with gateway(second, tasks=database(tmp_path)) as two:
            async with gateway(first, tasks=database(tmp_path)) as one:
                second.is_ready = False
                second.always = ServerUnavailable("not yet")
                task_id = (await submitted(one))["id"]
                while not first.running:
                    await asyncio.sleep(0.02)
            assert first.running == 0
            second.always = None
            done = await until(two, task_id)  # a lease is far longer than this test
            assert done["state"] == "done"
            assert seeds(second)[-1] == seeds(first)[0] == done["result"]["seed"]

    asyncio.run(run())


def test_task_of_a_dead_gateway_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = FakeServer(), FakeServer()
    first.hung = True
    monkeypatch.setattr(store, "LEASE_S", 0.5)

    async def run() -> None:
        async with gateway(first, tasks=database(tmp_path)) as one:
            task_id = (await submitted(one))["id"]
            await until(one, task_id, "running")
            monkeypatch.setattr(Store, "release", _nothing)
        async with gateway(second, tasks=database(tmp_path)) as two:
            done = await until(two, task_id)
            assert (done["state"], done["attempts"]) == ("done", 2)
            assert seeds(second) == seeds(first)

    asyncio.run(run())


def test_lease_outlives_a_long_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = FakeServer(), FakeServer()
    first.always = after(2.5)
    monkeypatch.setattr(store, "LEASE_S", 1.0)

    async def run() -> None:
        async with gateway(first, tasks=database(tmp_path)) as one:
            task_id = (await submitted(one))["id"]
            await until(one, task_id, "running")
            async with gateway(second, tasks=database(tmp_path)) as two:
                assert (await until(two, task_id))["attempts"] == 1
        assert second.calls == []

    asyncio.run(run())


def test_result_of_a_lost_attempt_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer()
    write = ResultFiles._write

    async def use(http: httpx.AsyncClient) -> None:
        engine = new_engine(database_url(database(tmp_path)))

        async def give_away(call: Call) -> Outputs:
            async with engine.begin() as connection:
                await connection.execute(text("UPDATE genserve_tasks SET attempts = 7, state = 'cancelled'"))
            return image(call)

        server.always = give_away
        task_id = (await submitted(http))["id"]
        while not written or results(tmp_path):
            await asyncio.sleep(0.02)
        assert (await until(http, task_id))["state"] == "cancelled"
        await engine.dispose()

    def note(folder: ResultFiles, name: str, data: bytes) -> None:
        write(folder, name, data)
        written.append(name)

    written: list[str] = []
    monkeypatch.setattr(ResultFiles, "_write", note)
    ask(use, tmp_path, server)


def test_tasks_wait_while_no_server_is_reachable(tmp_path: Path) -> None:
    server = FakeServer()
    server.always = ServerUnavailable("nobody is there")

    async def use(http: httpx.AsyncClient) -> None:
        ids = [(await submitted(http))["id"] for _ in range(4)]
        while len(server.calls) < 5:
            await asyncio.sleep(0.02)
        server.always = None
        for task_id in ids:
            assert (await until(http, task_id))["state"] == "done"

    ask(use, tmp_path, server)


@pytest.mark.parametrize("hung", [True, False], ids=["running", "unreachable"])
def test_task_ends_at_its_deadline(hung: bool, tmp_path: Path) -> None:
    server = Painter()
    server.hung = hung
    server.always = None if hung else ServerUnavailable("nobody is there")

    async def use(http: httpx.AsyncClient) -> None:
        failed = await until(http, (await submitted(http, json={"prompt": "x", "timeout": 0.4}))["id"])
        assert (failed["state"], failed["error"]["class"]) == ("failed", "DeadlineExceeded")
        assert failed["ended_at"] >= failed["deadline_at"] - 0.1
        while server.running:
            await asyncio.sleep(0.02)

    ask(use, tmp_path, server)


@pytest.mark.parametrize("error", [InvalidInput("STEPS is 0"), OutOfMemory("too large"), ServerError("broken")])
def test_errors_of_the_request_end_the_task_and_no_other(error: Exception, tmp_path: Path) -> None:
    server = FakeServer()
    server.script = [error]

    async def use(http: httpx.AsyncClient) -> None:
        failed = await until(http, (await submitted(http))["id"])
        assert (failed["state"], failed["result"], failed["attempts"]) == ("failed", None, 1)
        assert failed["error"] == {"class": type(error).__name__, "message": str(error)}
        assert (await until(http, (await submitted(http))["id"]))["state"] == "done"

    ask(use, tmp_path, server)


def test_image_that_cannot_be_written_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, failures = ResultFiles._write, [1, 2]

    def sometimes_full(folder: ResultFiles, name: str, data: bytes) -> None:
        if failures:
            failures.pop()
            raise OSError(28, "No space left on device")
        write(folder, name, data)

    monkeypatch.setattr(ResultFiles, "_write", sometimes_full)

    async def use(http: httpx.AsyncClient) -> None:
        assert (await until(http, (await submitted(http))["id"]))["attempts"] == 3

    ask(use, tmp_path)


def test_most_urgent_task_runs_first(tmp_path: Path) -> None:
    server = FakeServer()

    async def use(http: httpx.AsyncClient) -> None:
        gate = asyncio.Event()
        server.always = gated(gate)
        for number in range(FIRST_PER_SERVER):
            await until(http, (await submitted(http, json={"prompt": f"busy {number}"}))["id"], "running")
        bodies = [{"prompt": name, "priority": name} for name in ("low", "normal", "high")]
        ids = [(await submitted(http, json=body))["id"] for body in bodies]
        assert [(await until(http, task_id, "queued"))["position"] for task_id in ids] == [3, 2, 1]
        gate.set()
        for task_id in ids:
            await until(http, task_id)
        asked = [call.inputs["PROMPT"].item().decode() for call in server.calls[FIRST_PER_SERVER:]]
        assert asked == ["high", "normal", "low"]
        assert [call.priority for call in server.calls[FIRST_PER_SERVER:]] == [1, 2, 3]

    ask(use, tmp_path, server)


def test_too_many_unfinished_tasks_are_refused(tmp_path: Path) -> None:
    server = FakeServer()
    server.hung = True

    async def use(http: httpx.AsyncClient) -> None:
        for _ in range(2):
            await submitted(http)
        answer = await http.post("/v1/tasks", json={"prompt": "x"})
        assert (answer.status_code, answer.json()["error"]) == (503, "QueueFull")
        assert int(answer.headers["retry-after"]) >= 1

    ask(use, tmp_path, server, max_tasks=2)


def test_lost_database_is_answered_with_503(tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient) -> None:
        task_id = (await submitted(http))["id"]
        await until(http, task_id)
        engine = new_engine(database_url(database(tmp_path)))
        async with engine.begin() as connection:
            await connection.execute(text("ALTER TABLE genserve_tasks RENAME TO hidden"))
        for method, path in (("POST", ""), ("GET", ""), ("GET", f"/{task_id}"), ("DELETE", f"/{task_id}")):
            answer = await http.request(method, f"/v1/tasks{path}", json={"prompt": "x"} if method == "POST" else None)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        async with engine.begin() as connection:
            await connection.execute(text("ALTER TABLE hidden RENAME TO genserve_tasks"))
        await engine.dispose()
        assert (await until(http, (await submitted(http))["id"]))["state"] == "done"

    ask(use, tmp_path)


def test_gateway_without_a_database_keeps_no_tasks() -> None:
    async def use(http: httpx.AsyncClient) -> None:
        for method, path in (("POST", ""), ("GET", ""), ("GET", f"/{'0' * 32}")):
            answer = await http.request(method, f"/v1/tasks{path}", json={"prompt": "x"} if method == "POST" else None)
            assert answer.status_code == 404
            assert "keeps no tasks" in answer.json()["message"]

    with_gateway(use)


async def events(http: httpx.AsyncClient, task_id: str) -> list[dict[str, Any]]:
    """Return the data of all events until the stream ends. Each event has the name of its type."""
    answer = await http.get(f"/v1/tasks/{task_id}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.splitlines()
    found = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert [line.removeprefix("event: ") for line in lines if line.startswith("event: ")] == [
        event["type"] for event in found
    ]
    return found


def test_events_follow_a_task_to_its_end(tmp_path: Path) -> None:
    server = Painter()
    server.steps, server.preview = [1, 2, 3], b"jpeg"

    async def use(http: httpx.AsyncClient) -> None:
        others, own = asyncio.Event(), asyncio.Event()
        server.script = [gated(others)] * FIRST_PER_SERVER
        server.always = gated(own)
        for _ in range(FIRST_PER_SERVER):
            await until(http, (await submitted(http))["id"], "running")
        found, task_id = [], (await submitted(http))["id"]
        async for event in followed(http, task_id):
            found.append(event)
            others.set()
            if event["type"] == "step" and event["step"] == 3:
                own.set()
        kinds = [event["type"] for event in found]
        assert (kinds[0], found[0]["position"]) == ("queued", 1)
        assert kinds[-1] == "done"
        assert found[-1]["result"]["url"].startswith("/files/")
        steps = [event["step"] for event in found if event["type"] == "step"]
        assert steps == sorted(set(steps))
        previews = [event for event in found if event["type"] == "preview"]
        assert base64.b64decode(previews[-1]["b64_json"]) == b"jpeg"
        assert {event["id"] for event in found} == {task_id}
        # As for a caller that comes back later.
        assert await events(http, task_id) == [found[-1]]

    ask(use, tmp_path, server)


def gated(gate: asyncio.Event) -> Answer:
    """Return an answer that waits for an event."""

    async def answer(call: Call) -> Outputs:
        await gate.wait()
        return image(call)

    return answer


async def followed(http: httpx.AsyncClient, task_id: str) -> AsyncIterator[dict[str, Any]]:
    """Yield the data of the events one by one, which httpx' transport for applications cannot do."""
    tasks: Tasks = http._transport.app.state.durable.tasks  # type: ignore[attr-defined]
    task = await tasks.store.get(task_id, "")
    assert task is not None
    async for event in task_events.follow(tasks, task, lambda path: path):
        yield json.loads(str(event.data))


@pytest.mark.parametrize("end", ["failed", "cancelled"])
def test_events_end_with_the_task(end: str, tmp_path: Path) -> None:
    server = FakeServer()
    if end == "failed":
        server.always = ServerError("broken")
    server.hung = end == "cancelled"

    async def use(http: httpx.AsyncClient) -> None:
        task_id = (await submitted(http))["id"]
        await until(http, task_id, "running", "failed")
        following = asyncio.ensure_future(events(http, task_id))
        await asyncio.sleep(0.2)
        if end == "cancelled":
            await http.delete(f"/v1/tasks/{task_id}")
        last = (await following)[-1]
        assert (last["type"], last["state"], last["result"]) == (end, end, None)

    ask(use, tmp_path, server)


def test_progress_and_preview_of_a_running_task(tmp_path: Path) -> None:
    server = Painter()
    server.hung, server.steps, server.preview = True, [3], b"jpeg"

    async def use(http: httpx.AsyncClient) -> None:
        task_id = (await submitted(http))["id"]
        await until(http, task_id, "running")
        while not (found := await until(http, task_id, "running"))["preview"]:
            await asyncio.sleep(0.02)
        assert (found["step"], found["steps"], found["progress"]) == (3, 4, 0.75)
        assert base64.b64decode(found["preview"]) == b"jpeg"
        while (await http.get("/v1/tasks")).json()["data"][0]["step"] != 3:  # of the database, not of the server
            await asyncio.sleep(0.02)

    ask(use, tmp_path, server)


def test_viewers_share_one_look_at_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "BEAT_S", 100.0)
    monkeypatch.setattr(runner, "FRESH_S", 100.0)
    server = Painter()
    server.hung, server.steps = True, [1]

    async def use(http: httpx.AsyncClient) -> None:
        task_id = (await submitted(http))["id"]
        await until(http, task_id, "running")
        server.tasks.clear()
        runner_looks = [until(http, task_id, "running") for _ in range(30)]
        assert {each["steps"] for each in await asyncio.gather(*runner_looks)} <= {0, 4}
        assert len(server.tasks) <= 1

    ask(use, tmp_path, server)


def test_lane_tries_one_task_after_a_failure_of_all_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(lane.time, "monotonic", lambda: now[0])

    async def run() -> None:
        tasks = Lane("image", 4)
        assert tasks.room() == 4 * FIRST_PER_SERVER
        tasks.refused(ServerUnavailable("gone"))
        assert tasks.room() == 0
        now[0] += 1
        assert tasks.room() == 1
        tasks.runs["x"] = Run(_stored("x"), since=now[0])
        assert tasks.room() == 0
        now[0] += lane.TRIAL_S + 0.1
        assert tasks.room() == 4 * FIRST_PER_SERVER - 1

    asyncio.run(run())


def test_lane_grows_while_that_raises_the_throughput(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(lane.time, "monotonic", lambda: now[0])

    async def run() -> int:
        tasks = Lane("image", 1)
        for number in range(2000):
            for free in range(tasks.room()):
                tasks.runs[f"{number}-{free}"] = Run(_stored("x"))
            now[0] += 1 / min(len(tasks.runs), 12)
            tasks.completed()
            tasks.runs.popitem()
        return tasks.room() + len(tasks.runs)

    assert 8 <= asyncio.run(run()) <= 24


def test_lane_does_not_grow_while_the_queue_is_empty() -> None:
    async def run() -> int:
        tasks = Lane("image", 1)
        for _ in range(50):
            tasks.runs["only"] = Run(_stored("only"))
            tasks.completed()
            tasks.runs.clear()
        return tasks.room()

    assert asyncio.run(run()) == FIRST_PER_SERVER


def test_runner_grows_with_a_server_that_takes_more(tmp_path: Path) -> None:
    server = FakeServer()
    server.always = after(0.3)

    async def use(http: httpx.AsyncClient) -> None:
        ids = [(await submitted(http))["id"] for _ in range(40)]
        for task_id in ids:
            await until(http, task_id)
        assert server.most_running > FIRST_PER_SERVER

    ask(use, tmp_path, server)


def _stored(task_id: str) -> Any:
    class Stored:
        id = task_id

    return Stored()


async def _nothing(*_: object) -> None:
    pass
