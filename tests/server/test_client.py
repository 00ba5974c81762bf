"""Both clients against a real server, over both protocols: tasks, cancellation, many requests."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from conftest import PROTOCOLS, Server, wait_until

from genserve import AsyncClient, Cancelled, Client, DeadlineExceeded, InvalidInput, TaskStatus

PROTOCOL = pytest.mark.parametrize("protocol", PROTOCOLS)
LONG: dict[str, Any] = {"steps": 100, "height": 256, "width": 256}
"""Settings of an image that takes several seconds."""


def run(server: Server, protocol: str, test: Callable[[AsyncClient], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        async with AsyncClient(server.url(protocol), timeout=120) as client:
            await test(client)

    asyncio.run(whole())


def wait_cancelled(client: Client, task_id: str) -> TaskStatus:
    return wait_until(
        lambda: (found := client.task(task_id)).state == "cancelled" and found,
        timeout_s=10,
        what=f"cancellation of {task_id}",
    )


@PROTOCOL
def test_both_clients_make_the_same_image(protocol: str, server: Server, client: Client) -> None:
    async def test(ours: AsyncClient) -> None:
        image = await ours.generate("a red circle", steps=4, seed=7)
        assert image.data == client.generate("a red circle", steps=4, seed=7).data
        ranking = await ours.rerank("capital of France", ["Rome", "Paris"], top_n=1)
        assert list(ranking) == list(client.rerank("capital of France", ["Rome", "Paris"], top_n=1))
        assert await ours.health()
        assert [status.ready for status in await ours.status()] == [True]
        assert {model.name for model in await ours.models()} == {"flux", "rerank", "tasks"}
        with pytest.raises(InvalidInput, match="STEPS is 0"):
            await ours.generate("x", steps=0)

    run(server, protocol, test)


@PROTOCOL
def test_two_hundred_awaits_at_once(protocol: str, server: Server) -> None:
    async def test(client: AsyncClient) -> None:
        before = threading.active_count()
        # The queue of a model holds 150 requests, so both models have their part.
        images = [asyncio.ensure_future(client.generate("x", steps=1, height=64, width=64)) for _ in range(80)]
        rankings = [asyncio.ensure_future(client.rerank("q", [f"document {number}"])) for number in range(120)]
        await asyncio.sleep(0.05)
        threads = threading.active_count()
        assert len({image.seed for image in await asyncio.gather(*images)}) == 80
        assert len({ranking[0].score for ranking in await asyncio.gather(*rankings)}) > 1
        assert threads - before < 20  # gRPC has some of its own

    run(server, protocol, test)


def test_task_shows_steps_and_previews(client: Client) -> None:
    with client.submit("a green star", steps=60, height=192, width=192) as task:
        seen = list(task)
        assert seen[-1].state == "done"
        steps = [status.step for status in seen if status.state == "running"]
        assert steps == sorted(steps)
        assert len(set(steps)) >= 3
        assert any(status.preview_image for status in seen)
        preview = task.preview()
        assert preview is not None
        assert preview.size == (192, 192)
        assert task.result().info["task_id"] == task.id


def test_submit_returns_at_once_and_cancel_reaches_the_server(client: Client) -> None:
    task = client.submit("unwanted", **LONG)
    wait_until(lambda: task.progress().step > 2, what="the first steps")
    with pytest.raises(TimeoutError):
        task.result(timeout=0.1)
    task.cancel()
    with pytest.raises(Cancelled):
        task.result()
    assert wait_cancelled(client, task.id).step < 90


@PROTOCOL
@pytest.mark.parametrize("how", ["cancel", "wait_for", "with"])
def test_cancelled_await_stops_the_work(how: str, protocol: str, server: Server, grpc_client: Client) -> None:
    name = f"await-{how}-{protocol}-{time.monotonic_ns()}"

    async def test(client: AsyncClient) -> None:
        if how == "with":
            async with client.submit("unwanted", task_id=name, **LONG) as task:
                await asyncio.sleep(0.5)
            assert task.done()
        elif how == "wait_for":
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.generate("unwanted", task_id=name, **LONG), 0.5)
        else:
            request = asyncio.ensure_future(client.generate("unwanted", task_id=name, **LONG))
            await asyncio.sleep(0.5)
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request

    run(server, protocol, test)
    assert wait_cancelled(grpc_client, name).step < 90


@PROTOCOL
def test_deadline_stops_the_work(protocol: str, server: Server, grpc_client: Client) -> None:
    name = f"late-{protocol}-{time.monotonic_ns()}"
    with Client(server.url(protocol)) as client, pytest.raises(DeadlineExceeded):
        client.generate("too late", task_id=name, timeout=0.7, **LONG)
    ended = wait_until(
        lambda: (found := grpc_client.task(name)).state in {"cancelled", "failed"} and found,
        timeout_s=10,
        what=f"the end of {name}",
    )
    assert ended.step < 90


@PROTOCOL
def test_interrupted_program_stops_its_work(protocol: str, server: Server, grpc_client: Client) -> None:
    name = f"interrupted-{protocol}-{time.monotonic_ns()}"
    program = (
        "import sys, genserve; genserve.Client(sys.argv[1]).generate('x', task_id=sys.argv[2], steps=100, width=256)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, server.url(protocol), name], stderr=subprocess.PIPE, text=True
    ) as process:
        wait_until(lambda: grpc_client.task(name).is_in_flight, what="the request")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert errors.strip().endswith("KeyboardInterrupt")
    assert wait_cancelled(grpc_client, name).step < 90


def test_on_progress_sees_the_steps(client: Client) -> None:
    seen: list[TaskStatus] = []
    image = client.generate("a red circle", steps=60, height=192, width=192, on_progress=seen.append)
    assert image.image.size == (192, 192)
    assert (seen[-1].state, seen[-1].step) == ("done", 60)
    assert len({status.step for status in seen}) >= 3


def test_many_images_keep_their_prompts(client: Client) -> None:
    items = [{"prompt": f"a {colour} circle", "seed": seed} for seed in range(4) for colour in ("red", "blue", "green")]
    alone = [client.generate(steps=2, **item).data for item in items]
    results = list(client.map_generate([*items, {"prompt": "x", "steps": 0}], steps=2))
    assert [result.result and result.result.data for result in results] == [*alone, None]
    assert isinstance(results[-1].error, InvalidInput)


def test_many_rankings_keep_their_documents(client: Client) -> None:
    items = [("number", [f"number {number}", "letter"]) for number in range(100)]
    results = list(client.map_rerank(iter(items), ordered=True))
    assert [result.result[0].document in items[result.index][1] for result in results if result.result] == [True] * 100
    assert results[7].result is not None
    assert results[7].result.scores == client.rerank(*items[7]).scores


def test_load_and_settings_of_the_server(client: Client, server: Server) -> None:
    with client.submit("x", **LONG) as task:
        wait_until(lambda: task.progress().state == "running", what="the first step")
        wait_until(lambda: any(load.running for load in client.gpu_load()), what="a running task in the load")
        loads = {load.model: load for load in client.gpu_load()}
    assert loads.keys() == {"flux", "rerank"}
    assert loads["flux"].running >= 1
    assert loads["flux"].ready
    assert 0 < (loads["flux"].memory_used or 0) < (loads["flux"].memory_total or 0)
    assert loads["rerank"].url in {server.grpc, server.http}
    settings = {(setting.model, setting.name): setting for setting in client.config()}
    path = settings["flux", "model_path"]
    assert path.value.endswith("flux")
    assert path.source == "environment FLUX_MODEL_PATH"
    assert settings["flux", "max_running"].source in {"default", "config.pbtxt"}
