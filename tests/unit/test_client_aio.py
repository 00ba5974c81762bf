"""AsyncClient and Client as twins, and the tasks that they submit."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from fake_servers import FakeServer, after, image, task

from genserve import AsyncClient, Cancelled, Client, InvalidInput, ServerError, ServerUnavailable, TaskStatus
from genserve.protocol import Call, Outputs

VERBS = sorted(name for name in vars(AsyncClient) if not name.startswith("_"))


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_is_in_both_clients_with_equal_arguments(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(kind, name)) for kind in (AsyncClient, Client))
    assert list(ours.parameters.values())[1:] == list(theirs.parameters.values())[1:]
    assert inspect.getdoc(getattr(Client, name))


def test_clients_have_no_verbs_of_their_own() -> None:
    assert [name for name in sorted(vars(Client)) if not name.startswith("_")] == VERBS
    ours, theirs = (list(inspect.signature(kind).parameters.values()) for kind in (AsyncClient, Client))
    assert ours == theirs


def test_many_awaits_need_no_threads() -> None:
    server = FakeServer()
    server.always = after(0.05)

    async def run() -> int:
        async with AsyncClient(transport=[server]) as client:
            requests = [asyncio.ensure_future(client.rerank("q", ["d"])) for _ in range(200)]
            await asyncio.sleep(0.02)
            threads = threading.active_count()
            await asyncio.gather(*requests)
        return threads

    before = threading.active_count()
    assert asyncio.run(run()) == before
    assert server.most_running == 200


def test_synchronous_clients_share_one_thread() -> None:
    clients = [Client(transport=[FakeServer()]) for _ in range(3)]
    clients[0].rerank("q", ["d"])
    before = threading.active_count()
    for client in clients:
        client.rerank("q", ["d"])
    assert threading.active_count() == before


class Painter(FakeServer):
    """Server with a tasks model; an image takes until the test finishes it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.done: dict[str, asyncio.Future[Exception | None]] = {}
        self.step = 0
        self.state = "running"
        self.always = self.paint

    async def paint(self, call: Call) -> Outputs:
        self.done[call.request_id] = asyncio.get_running_loop().create_future()
        error = await self.done[call.request_id]
        if error:
            raise error
        return image(call)

    async def infer(self, call: Call, timeout_s: float) -> Outputs:
        if call.model != "tasks":
            return await super().infer(call, timeout_s)
        action, task_id = (call.inputs[name].item().decode() for name in ("ACTION", "TASK_ID"))
        self.tasks.append((action, task_id))
        if isinstance(self.is_live, Exception):
            raise self.is_live
        return task(task_id, self.state, step=self.step, steps=4, model="flux")

    async def started(self, task_id: str) -> None:
        while task_id not in self.done:
            await asyncio.sleep(0.001)

    def finish(self, task_id: str, error: Exception | None = None) -> None:
        self.done[task_id].set_result(error)


def test_task_tells_its_progress_and_result() -> None:
    async def run() -> None:
        server = Painter()
        async with AsyncClient(transport=[server]) as client:
            found = client.submit("x", seed=5, task_id="mine")
            assert (found.id, found.done()) == ("mine", False)
            server.state = "unknown"
            assert await found.progress() == TaskStatus("mine", "waiting")
            await server.started("mine")
            server.state, server.step = "running", 2
            status = await found.progress()
            assert (status.state, status.step, status.progress) == ("running", 2, 0.5)
            assert await found.preview() is None
            with pytest.raises(TimeoutError, match=r"task mine is not done after 0\.01 s"):
                await found.result(timeout=0.01)
            server.finish("mine")
            assert (await found.result()).seed == 5
            assert (await found).seed == 5
            assert found.done()
            asked = len(server.tasks)
            assert (await found.progress()).state == "done"
            assert (await found.progress()).progress == 1.0
            assert len(server.tasks) == asked

    asyncio.run(run())


def test_progress_is_asked_of_the_server_that_has_the_task() -> None:
    async def run() -> None:
        servers = [Painter(url="a"), Painter(url="b")]
        async with AsyncClient(transport=servers) as client:
            tasks = [client.submit("x", task_id=name) for name in ("one", "two")]
            await servers[0].started("one")
            await servers[1].started("two")
            await tasks[0].progress()
            await tasks[1].progress()
            assert [server.tasks for server in servers] == [[("status", "one")], [("status", "two")]]

    asyncio.run(run())


def test_unreachable_tasks_model_does_not_fail_the_task() -> None:
    async def run() -> None:
        server = Painter()
        async with AsyncClient(transport=[server]) as client:
            found = client.submit("x", task_id="mine")
            await server.started("mine")
            server.step = 1
            await found.progress()
            server.is_live = ServerUnavailable("tasks is down")
            assert (await found.progress()).step == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "state"),
    [(ServerError("broken"), "failed"), (Cancelled("by tasks"), "cancelled")],
    ids=["failed", "cancelled"],
)
def test_failed_task_tells_its_error(error: Exception, state: str) -> None:
    async def run() -> None:
        server = Painter()
        async with AsyncClient(transport=[server]) as client:
            found = client.submit("x", task_id="mine")
            await server.started("mine")
            server.finish("mine", error)
            with pytest.raises(type(error)) as caught:
                await found
            assert caught.value.request_id == "mine"
            status = await found.progress()
            assert (status.state, status.error) == (state, str(error))
            assert (await found.cancel()).state == state

    asyncio.run(run())


def test_invalid_arguments_fail_the_task() -> None:
    async def run() -> None:
        async with AsyncClient(transport=[FakeServer()]) as client:
            found = client.submit("x", priority="urgent")
            with pytest.raises(InvalidInput):
                await found
            with pytest.raises(TypeError):
                await client.submit("x", stepz=3)

    asyncio.run(run())


@pytest.mark.parametrize("how", ["cancel", "with", "await", "wait_for"])
def test_task_is_cancelled_on_its_server(how: str) -> None:
    async def run() -> None:
        server = Painter()
        async with AsyncClient(transport=[server]) as client:
            found = client.submit("x", task_id="mine")
            await server.started("mine")
            if how == "cancel":
                assert (await found.cancel()).state == "running"
            elif how == "with":
                async with found:
                    pass
            elif how == "await":
                waiting = asyncio.ensure_future(found.result())
                await asyncio.sleep(0)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
            else:
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(found.result(), 0.01)
            await asyncio.sleep(0.01)
            assert server.running == 0
            assert [action for action, _ in server.tasks if action == "cancel"] == ["cancel"]
            with pytest.raises(Cancelled) as caught:
                await found
            assert (caught.value.request_id, caught.value.model) == ("mine", "flux")
            assert (await found.progress()).state == "cancelled"

    asyncio.run(run())


def test_iteration_yields_each_change_and_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genserve.handles.POLL_S", 0.005)

    async def run() -> list[tuple[str, int]]:
        server = Painter()
        async with AsyncClient(transport=[server]) as client:
            found = client.submit("x", task_id="mine")
            await server.started("mine")
            seen = []
            async for status in found:
                seen.append((status.state, status.step))
                server.step += 1
                if server.step == 3:
                    server.finish("mine")
            return seen

    assert asyncio.run(run()) == [("running", 0), ("running", 1), ("running", 2), ("done", 4)]


@pytest.mark.parametrize("kind", ["function", "coroutine"])
def test_on_progress_is_called_by_the_asynchronous_client(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genserve.handles.POLL_S", 0.005)
    seen: list[str] = []

    async def noted(status: TaskStatus) -> None:
        await asyncio.sleep(0)
        seen.append(status.state)

    async def run() -> None:
        server = Painter()
        async with AsyncClient(transport=[server]) as client:
            on_progress: Callable[..., Any] = noted if kind == "coroutine" else lambda status: seen.append(status.state)
            work = asyncio.ensure_future(client.generate("x", task_id="mine", on_progress=on_progress))
            await server.started("mine")
            await asyncio.sleep(0.02)
            server.finish("mine")
            assert (await work).data == b"x"

    asyncio.run(run())
    assert seen[-2:] == ["running", "done"]


def test_on_progress_that_raises_cancels_the_request() -> None:
    async def run() -> None:
        server = Painter()

        def fail(_: TaskStatus) -> None:
            raise KeyError("mine")

        async with AsyncClient(transport=[server]) as client:
            with pytest.raises(KeyError, match="mine"):
                await client.generate("x", on_progress=fail)
            assert server.running == 0

    asyncio.run(run())


def test_synchronous_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genserve.handles.POLL_S", 0.005)
    server = Painter()
    server.step = 1
    with Client(transport=[server]) as client:
        found = client.submit("x", task_id="mine", seed=9)
        while found.progress().state != "running":
            time.sleep(0.001)
        assert not found.done()
        assert found.preview() is None
        with pytest.raises(TimeoutError):
            found.result(timeout=0.01)
        seen = []
        for status in found:
            seen.append(status.state)
            if status.state == "running":
                server.done["mine"].get_loop().call_soon_threadsafe(server.finish, "mine")
        assert seen == ["running", "done"]
        assert found.result().seed == 9
        with client.submit("y") as left:
            pass
        with pytest.raises(Cancelled):
            left.result()
        assert left.cancel().state == "cancelled"


def test_on_progress_is_called_in_the_callers_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genserve.handles.POLL_S", 0.005)
    server = Painter()
    seen: list[tuple[str, int]] = []

    def note(status: TaskStatus) -> None:
        seen.append((status.state, threading.get_ident()))
        assert client.health()  # another call of the same client
        if status.state == "running":
            server.done["mine"].get_loop().call_soon_threadsafe(server.finish, "mine")

    with Client(transport=[server]) as client:
        image = client.generate("x", task_id="mine", on_progress=note)
    assert image.data == b"x"
    assert {thread for _, thread in seen} == {threading.get_ident()}
    assert [state for state, _ in seen][-2:] == ["running", "done"]


def test_client_works_in_several_event_loops() -> None:
    client = AsyncClient(transport=[FakeServer()])

    async def ask() -> float:
        return (await client.rerank("q", ["abc"]))[0].score

    assert [asyncio.run(ask()) for _ in range(2)] == [3.0, 3.0]
