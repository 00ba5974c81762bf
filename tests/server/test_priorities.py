"""Priorities inside an instance, and their metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton_http
from conftest import PROTOCOLS, Server, serving, wait_until
from tritonclient.utils import InferenceServerException

from genserve import Client
from genserve_backend.worker.engine import HEARTBEAT_S


@pytest.fixture(scope="module")
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Server with one slot and a backlog of one request."""
    arguments = ("--model", "flux", "--model", "tasks")
    yield from serving(tmp_path_factory, *arguments, FLUX_MAX_RUNNING="1", MAX_GPU_QUEUE_SIZE="1")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_high_priority_preempts_and_the_preempted_request_resumes(server: Server, protocol: str) -> None:
    before = server.metric("flux", "genserve_preemptions_total")
    with Client(server.url(protocol), timeout=120) as client, ThreadPoolExecutor(1) as pool:
        alone = client.generate("a long one", steps=100, height=256, width=256, seed=1)
        paused = pool.submit(
            client.generate, "a long one", steps=100, height=256, width=256, seed=1, priority="low", task_id="paused"
        )
        wait_until(lambda: any(task.step > 0 for task in client.status()[0].tasks), what="the first to run")
        urgent = client.generate("an urgent one", steps=4, priority="high")
        assert not paused.done()
        assert paused.result().data == alone.data  # one at a time, so not even a rounding differs
    assert urgent.info["queue_s"] < paused.result().info["denoise_s"]
    wait_until(
        lambda: server.metric("flux", "genserve_preemptions_total") == before + 1, what="the pause to be counted"
    )


def test_metrics_count_priorities(server: Server) -> None:
    def counts() -> dict[str, float]:
        return {
            "images": server.metric("flux", "genserve_requests_total", outcome="done"),
            "failed": server.metric("flux", "genserve_requests_total", outcome="failed"),
            "steps": server.metric("flux", "genserve_steps_total"),
            "forwards": server.metric("flux", "genserve_batch_size_count"),
        }

    time.sleep(2 * HEARTBEAT_S + 0.5)  # until what other tests have done is told
    before = counts()
    stages = {
        stage: server.metric("flux", "genserve_stage_seconds_total", stage=stage)
        for stage in ("encode", "denoise", "decode")
    }
    with Client(server.grpc) as client:
        for seed in range(3):
            client.generate(f"counted {time.monotonic_ns()}", steps=5, seed=seed)
    expected = {"images": 3.0, "failed": 0.0, "steps": 15.0, "forwards": 15.0}
    wait_until(lambda: {name: counts()[name] - before[name] for name in before} == expected, what="the counts")
    for stage, seconds in stages.items():
        assert server.metric("flux", "genserve_stage_seconds_total", stage=stage) > seconds
    assert server.metric("flux", "genserve_device_memory_bytes") > 1e7
    assert server.metric("flux", "genserve_worker_restarts_total") == 0
    wait_until(lambda: server.metric("flux", "genserve_running") == 0, what="nothing to run")


@pytest.mark.parametrize("value", [0, 4, -1, "high", 1.5], ids=str)
def test_unknown_priority_is_rejected(server: Server, value: Any) -> None:
    prompt = triton_http.InferInput("PROMPT", [1, 1], "BYTES")
    prompt.set_data_from_numpy(np.array([[b"x"]], dtype=object))
    client = triton_http.InferenceServerClient(server.http.removeprefix("http://"))
    with pytest.raises(InferenceServerException, match="InvalidInput: priority_level is .*; allowed: 1 to 3"):
        client.infer("flux", [prompt], parameters={"priority_level": value})
    client.close()
