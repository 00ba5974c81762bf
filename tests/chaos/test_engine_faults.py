"""Crashes, hangs and cancellations within a batch: all other requests get their right image."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import tritonclient.grpc as triton_grpc
from blocking import BlockingTransport
from conftest import HANG_TIMEOUT_S, Server, wait_until
from pictures import Pixels, levels, same
from tritonclient.utils import InferenceServerException

from genserve import Client, protocol
from genserve.protocol import tasks_call
from genserve.wire import input_tensor

IN_FLIGHT = 8
REQUESTS = [{"prompt": f"number {seed}", "steps": 84 + seed, "seed": seed} for seed in range(2 * IN_FLIGHT)]
CROWD = 2000
CALLERS = 48
ANSWER_S = 120.0
"""Compiling workers start slowly, and one that replaces another repeats its requests one at a time."""
MEMORY_TOLERANCE = 1.05


@pytest.fixture
def client(pair: Server) -> Iterator[Client]:
    with Client(pair.grpc, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def expected(running_pair: Server) -> list[Pixels]:
    with Client(running_pair.grpc, timeout=120) as client:
        return [levels(client.generate(**request).data) for request in REQUESTS]


def start_all(pool: ThreadPoolExecutor, client: Client) -> tuple[list[Future[Any]], int]:
    """Send all requests; return them with an instance that has at least `IN_FLIGHT` of them."""
    futures = [pool.submit(client.generate, **request) for request in REQUESTS]

    def busy() -> list[str]:
        running = Counter(task.instance for task in client.status()[0].tasks if task.state == "running")
        return [instance for instance, count in running.items() if count >= IN_FLIGHT]

    name: str = wait_until(busy, what="the requests to run")[0]
    return futures, int(name.rpartition("_")[2])


def assert_expected(futures: list[Future[Any]], expected: list[Pixels]) -> None:
    images = [levels(future.result(ANSWER_S).data) for future in futures]
    assert all(same(*each) for each in zip(expected, images, strict=True))


def assert_replaced(server: Server, instance: int, worker: psutil.Process, cause: str) -> None:
    assert server.worker("flux", instance).pid != worker.pid
    assert not worker.is_running()
    death = [line for line in server.log.splitlines() if 'event="worker died"' in line][-1]
    assert cause in death
    assert "given_up=" not in death


def test_killed_worker_with_eight_in_flight_loses_no_image(
    pair: Server, client: Client, expected: list[Pixels]
) -> None:
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        futures, instance = start_all(pool, client)
        worker = pair.worker("flux", instance)
        worker.kill()
        assert_expected(futures, expected)
    assert_replaced(pair, instance, worker, "SIGKILL")


def test_hung_worker_is_detected_and_replaced(pair: Server, client: Client, expected: list[Pixels]) -> None:
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        futures, instance = start_all(pool, client)
        worker = pair.worker("flux", instance)
        worker.suspend()
        wait_until(lambda: not worker.is_running(), what="the worker's end", timeout_s=HANG_TIMEOUT_S + 3)
        assert_expected(futures, expected)
    assert_replaced(pair, instance, worker, "no sign of life")


class Caller:
    """Plain tritonclient with cancellable calls."""

    def __init__(self, server: Server) -> None:
        self._client = triton_grpc.InferenceServerClient(server.grpc)
        self._tasks = BlockingTransport(server.grpc)

    def call(self, name: str, *, steps: int, cancel: Callable[[Any, str], None] | None) -> str:
        """Send one request; return its outcome."""
        asked = protocol.generate_call(
            "one of a crowd",
            priority="normal",
            task_id=name,
            seed=random.randrange(2**63),
            steps=steps,
            height=64,
            width=64,
        )
        inputs = [input_tensor(triton_grpc.InferInput, *each) for each in asked.inputs.items()]
        answered = threading.Event()
        answers: list[InferenceServerException | None] = []

        def callback(result: object, error: InferenceServerException | None) -> None:
            answers.append(error)
            answered.set()

        call = self._client.async_infer("flux", inputs, callback)
        if cancel:
            time.sleep(random.random() * 0.4)
            cancel(call, name)
        assert answered.wait(ANSWER_S), f"{name} was never answered"
        time.sleep(0.01)
        assert len(answers) == 1
        if answers[0] is None:
            return "image"
        message = answers[0].message() or ""
        return "cancelled" if "cancel" in message.lower() else message

    def hang_up(self, call: Any, _name: str) -> None:
        call.cancel()

    def ask_tasks(self, _call: Any, name: str) -> None:
        self._tasks.infer(tasks_call("cancel", name), 10.0)


def memory(server: Server) -> int:
    return sum(process.memory_info().rss for process in server.family())


def crowd(server: Server, count: int) -> Counter[str]:
    """Send `count` requests and cancel every second one at a random time; return the outcomes."""
    caller = Caller(server)
    ways = [None, caller.hang_up, None, caller.ask_tasks]

    def one(index: int) -> str:
        cancel = ways[index % len(ways)]
        end = caller.call(f"crowd-{time.monotonic_ns()}-{index}", steps=random.randint(2, 12), cancel=cancel)
        assert cancel or end == "image", end
        return end

    with ThreadPoolExecutor(CALLERS) as pool:
        return Counter(pool.map(one, range(count)))


def test_random_cancellations_affect_no_other_request(pair: Server, client: Client) -> None:
    crowd(pair, CROWD // 4)
    before = memory(pair)
    ends = crowd(pair, CROWD)
    assert set(ends) == {"image", "cancelled"}
    assert sum(ends.values()) == CROWD
    assert ends["cancelled"] > CROWD // 8
    wait_until(lambda: not client.status()[0].tasks, what="nothing to be in flight")
    assert memory(pair) <= MEMORY_TOLERANCE * before
    assert client.generate("the next one", steps=2).info["mean_batch_size"] == 1
