"""Crashes of busy processes: no request hangs, and the server recovers by itself."""

from __future__ import annotations

import contextlib
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor

import psutil
import pytest
from conftest import Server, wait_until

from genserve import Client, GenServeError, ServerError

LONG = {"steps": 100, "height": 320, "width": 320, "seed": 4}
"""A request that takes seconds on a CPU."""


def running(client: Client, task_id: str) -> bool:
    """Return True once the task has started its steps."""
    return any(
        task.task_id == task_id and task.state == "running" and task.step > 0
        for status in client.status()
        for task in status.tasks
    )


def start_long(pool: ThreadPoolExecutor, client: Client, task_id: str) -> Future[bytes]:
    future = pool.submit(lambda: client.generate("a long one", task_id=task_id, **LONG).data)
    wait_until(lambda: running(client, task_id), what="the request to run")
    return future


def test_killed_worker_fails_no_request(server: Server, client: Client) -> None:
    expected = client.generate("a long one", **LONG).data
    worker = server.worker("flux")
    with ThreadPoolExecutor(4) as pool:
        long = start_long(pool, client, f"killed-{worker.pid}")
        others = [pool.submit(lambda seed=seed: client.generate("short", steps=2, seed=seed).data) for seed in range(3)]
        worker.kill()
        assert long.result(60) == expected
        assert all(other.result(60) for other in others)
    assert client.generate("the next one", steps=2).data
    replacement = server.worker("flux")
    assert replacement.pid != worker.pid
    deaths = [line for line in server.log.splitlines() if 'event="worker died"' in line]
    assert f"killed-{worker.pid}" in deaths[-1]


def test_killed_rerank_worker_fails_no_request(server: Server, client: Client) -> None:
    documents = [f"document {index} " + "word " * 200 for index in range(120)]
    expected = [document.score for document in client.rerank("document 7", documents)]
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.rerank, "document 7", documents)
        time.sleep(1.0)
        server.worker("rerank").kill()
        assert [document.score for document in future.result(60)] == pytest.approx(expected, abs=1e-4)
    assert client.rerank("q", ["a"])


def test_request_in_flight_at_two_crashes_fails(server: Server, grpc_client: Client) -> None:
    client = grpc_client
    with ThreadPoolExecutor(1) as pool:
        task_id = f"twice-{server.worker('flux').pid}"
        future = start_long(pool, client, task_id)
        first = server.worker("flux")
        first.kill()
        wait_until(lambda: server.worker("flux").pid != first.pid, what="a new worker")
        # Only what its predecessor left behind can run on the new worker.
        wait_until(lambda: running(client, task_id), what="the request to run again")
        wait_until(lambda: "worker ready" in server.log.rpartition("worker died")[2], what="the new worker to be ready")
        time.sleep(0.5)
        server.worker("flux").kill()
        with pytest.raises(ServerError, match="died 2 times"):
            future.result(60)
    assert client.generate("the next one", steps=2).data


@pytest.mark.parametrize("model", ["flux", "rerank", "tasks"])
def test_killed_stub_restarts_the_server(server: Server, grpc_client: Client, model: str) -> None:
    client = grpc_client
    stub, worker = server.stub(model), None if model == "tasks" else server.worker(model)
    with ThreadPoolExecutor(1) as pool:
        future = start_long(pool, client, f"stub-{stub.pid}")
        stub.kill()
        with contextlib.suppress(GenServeError):
            future.result(60)  # Another stub's death leaves it some time to finish.
    wait_until(lambda: f"stub {stub.pid} died" in server.log, what="the death to be noticed")
    wait_until(lambda: not psutil.pid_exists(stub.pid), what="the server to restart")
    server.wait_ready()
    assert client.generate("the next one", steps=2).data
    assert client.rerank("q", ["a"])
    if worker:
        wait_until(lambda: not psutil.pid_exists(worker.pid), what="the stub's worker to end")


def test_killed_tritonserver_is_restarted(server: Server, grpc_client: Client) -> None:
    triton = server.process.children()[0]
    family = triton.children(recursive=True)
    server.stub("flux").suspend()  # one that cannot end by itself, as one stuck on a lock cannot
    triton.kill()
    wait_until(lambda: not any(process.is_running() for process in family), what="stubs and workers to end")
    wait_until(lambda: "tritonserver ended with -9" in server.log, what="the death to be noticed")
    server.wait_ready()
    assert grpc_client.generate("the next one", steps=2).data


@pytest.mark.parametrize("part", ["stub", "tritonserver"])
def test_hung_process_is_replaced_after_the_hang_timeout(pair: Server, part: str) -> None:
    triton = pair.process.children()[0]
    stopped = pair.stub("flux", 1) if part == "stub" else triton
    stopped.suspend()
    with Client(pair.grpc, timeout=120, retry_for=100) as client:
        assert client.generate("patient", steps=2).data
        wait_until(lambda: f"no sign of life from {part}" in pair.log, what="the standstill to be noticed")
        wait_until(lambda: not psutil.pid_exists(stopped.pid), what="the stopped process to be killed")
        wait_until(client.health, what="the server to be ready")
        assert client.generate("the next one", steps=2).data
    assert not psutil.pid_exists(triton.pid)


def test_client_can_wait_for_the_restarted_server(server: Server) -> None:
    with Client(server.grpc, retry_for=60) as client:
        server.process.children()[0].send_signal(signal.SIGKILL)
        assert client.generate("patient", steps=2).data
