"""Overload: each request gets a response, late or at once with an error that names the limit."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tritonclient.grpc as triton_grpc
from blocking import BlockingTransport
from conftest import Server, serving, wait_until
from tritonclient.utils import InferenceServerException

from genserve import Cancelled, Client, DeadlineExceeded, GeneratedImage, QueueFull, protocol
from genserve.protocol import tasks_call
from genserve.wire import input_tensor

LONG = {"steps": 100, "height": 384, "width": 384}


@pytest.fixture(scope="module")
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Server with one slot: a single request fills it."""
    yield from serving(tmp_path_factory, FLUX_MAX_RUNNING="1", MAX_GPU_QUEUE_SIZE="0")


def outcome(client: Client, seed: int, **settings: object) -> str:
    try:
        made = client.generate("one of many", steps=1, height=64, width=64, seed=seed, **settings)
    except (QueueFull, DeadlineExceeded) as error:
        return type(error).__name__
    return type(made).__name__


def test_all_of_300_concurrent_requests_get_a_response(server: Server, client: Client) -> None:
    with ThreadPoolExecutor(300) as pool:
        outcomes = Counter(pool.map(lambda seed: outcome(client, seed), range(300)))
    assert outcomes.keys() <= {GeneratedImage.__name__, QueueFull.__name__}
    assert outcomes[GeneratedImage.__name__] >= 150
    assert sum(outcomes.values()) == 300
    assert outcome(client, 1) == GeneratedImage.__name__


def test_full_queue_rejects_at_once(grpc_client: Client) -> None:
    refused_while_busy = []
    with ThreadPoolExecutor(301) as pool:
        long = pool.submit(grpc_client.generate, "holds the instance", **LONG)
        time.sleep(0.5)

        def ask(seed: int) -> str:
            result = outcome(grpc_client, seed)
            if result == QueueFull.__name__:
                refused_while_busy.append(not long.done())
            return result

        outcomes = Counter(pool.map(ask, range(300)))
        long.result(120)
    assert outcomes[QueueFull.__name__] >= 100
    assert all(refused_while_busy)


def test_high_priority_overtakes_the_queue(server: Server) -> None:
    finished: list[str] = []
    with Client(server.grpc) as client, ThreadPoolExecutor(16) as pool:

        def ask(priority: str) -> None:
            client.generate(priority, steps=8, priority=priority)
            finished.append(priority)

        first = pool.submit(client.generate, "holds the instance", steps=100, height=256, width=256)
        time.sleep(0.3)
        waiting = [pool.submit(ask, "low") for _ in range(6)]
        time.sleep(0.3)
        waiting.append(pool.submit(ask, "high"))
        for each in (first, *waiting):
            each.result(60)
    assert finished[0] == "high"


def test_request_queued_past_its_timeout_is_rejected(server: Server, client: Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(client.generate, "holds the instance", **LONG)
        time.sleep(0.5)
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.generate("impatient", steps=1, timeout=0.3)
        assert time.monotonic() - started < 5
        assert long.result(120)


def bare_long(server: Server, *, task_id: str, callback: Any, timeout_us: int | None = None) -> Any:
    """Send a long request with plain tritonclient, which leaves deadlines to the server."""
    asked = protocol.generate_call("long", priority="normal", task_id=task_id, seed=0, **LONG)
    inputs = [input_tensor(triton_grpc.InferInput, *each) for each in asked.inputs.items()]
    client = triton_grpc.InferenceServerClient(server.grpc)
    return client.async_infer("flux", inputs, callback, timeout=timeout_us)


def task_state(server: Server, task_id: str, action: str = "status") -> str:
    transport = BlockingTransport(server.grpc)
    try:
        return str(json.loads(transport.infer(tasks_call(action, task_id), 10.0)["TASK"].item())["state"])
    finally:
        transport.close()


def test_request_running_past_its_deadline_is_stopped(server: Server) -> None:
    answered = threading.Event()
    errors: list[InferenceServerException] = []

    def callback(result: object, error: InferenceServerException) -> None:
        errors.append(error)
        answered.set()

    bare_long(server, task_id="too-slow", callback=callback, timeout_us=1_000_000)
    assert answered.wait(30)
    assert errors[0].status() == "StatusCode.UNAVAILABLE"
    assert errors[0].message().startswith("DeadlineExceeded: ")
    assert task_state(server, "too-slow") == "failed"


def test_grpc_cancellation_stops_the_request(server: Server) -> None:
    call = bare_long(server, task_id="hung-up", callback=lambda result, error: None)
    wait_until(lambda: task_state(server, "hung-up") == "running", what="the request to run")
    started = time.monotonic()
    call.cancel()
    wait_until(lambda: task_state(server, "hung-up") == "cancelled", what="the cancellation")
    assert time.monotonic() - started < 5
    with Client(server.grpc) as client:
        assert client.generate("the slot is free", steps=1).info["queue_s"] < 1


def test_tasks_cancels_running_request(server: Server, client: Client) -> None:
    task_id = f"cancel-{time.monotonic_ns()}"
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.generate, "unwanted", task_id=task_id, **LONG)
        wait_until(lambda: task_state(server, task_id) == "running", what="the request to run")
        task_state(server, task_id, action="cancel")
        with pytest.raises(Cancelled):
            future.result(30)
    assert task_state(server, task_id) == "cancelled"


def test_tasks_cancels_request_in_tritons_queue(server: Server, client: Client) -> None:
    task_id = f"early-{time.monotonic_ns()}"
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(client.generate, "holds the instance", **LONG)
        time.sleep(0.5)
        queued = pool.submit(client.generate, "unwanted", task_id=task_id, **LONG)
        time.sleep(0.5)
        assert task_state(server, task_id, action="cancel") == "unknown"
        with pytest.raises(Cancelled):
            queued.result(60)
        assert long.result(60)
