"""Plain REST callers: a concurrent test with aiohttp, status queries and health checks, with a real gateway."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
import httpx
import pytest
import requests
from conftest import Server, wait_until
from gateways import Gateway, running_gateway
from PIL import Image

from genserve import Client
from genserve.types import InstanceLoad, Setting

CALLS = 10


@pytest.fixture(scope="module")
def running(running_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), running_server.grpc) as gateway:
        yield gateway


@pytest.fixture
def gateway(running: Gateway, server: Server) -> Gateway:
    return running


async def send_concurrent_requests(address: str) -> list[tuple[int, dict[str, Any]]]:
    """Send requests as a caller of plain REST does who knows only the route and its fields."""
    async with aiohttp.ClientSession() as session:
        tasks = []
        for i in range(CALLS):
            data = {
                "prompt": f"Beautiful landscape {i}",
                "model_id": "flux1-dev",
                "height": 512,
                "width": 512,
                "num_inference_steps": 20,
                "priority": i % 3,
            }
            task = session.post(f"{address}/generate", json=data)
            tasks.append(task)
        responses = await asyncio.gather(*tasks)
        return [(response.status, await response.json()) for response in responses]


def test_concurrent_requests_get_images(gateway: Gateway, server: Server) -> None:
    answers = asyncio.run(send_concurrent_requests(gateway.url))
    assert [status for status, _ in answers] == [200] * CALLS
    with Client(server.grpc) as client:
        (device,) = {load.gpu_id for load in client.gpu_load() if load.model == "flux"}
    for _, result in answers:
        assert result["gpu_id"] == device
        assert result.get("elapsed_time") > 0
        assert (result["success"], result["model_id"], result["num_inference_steps"]) == (True, "flux1-dev", 20)
        image = Image.open(io.BytesIO(base64.b64decode(result["image"])))
        assert image.size == (result["width"], result["height"]) == (512, 512)
    assert len({result["image"] for _, result in answers}) == CALLS
    assert len({result["task_id"] for _, result in answers}) == CALLS


def test_prompt_is_enough(gateway: Gateway) -> None:
    result = requests.post(f"{gateway.url}/generate", json={"prompt": "a red circle"}, timeout=120).json()
    assert (result["height"], result["model_id"]) == (128, "flux")
    again = {"prompt": "a red circle", "seed": result["seed"], "cfg": result["cfg"], "priority": 0}
    assert requests.post(f"{gateway.url}/generate", json=again, timeout=120).json()["image"] == result["image"]


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        ({"prompt": "x", "model_id": "sdxl"}, 404, "model_id is 'sdxl'"),
        ({"prompt": "x", "priority": 3}, 400, "priority"),
        ({"prompt": "x", "height": 100}, 400, "HEIGHT is 100"),
        ({"prompt": "x", "num_inference_steps": "20"}, 400, "num_inference_steps"),
        ({}, 400, "prompt"),
    ],
    ids=["model", "priority", "height", "type", "empty"],
)
def test_errors_name_the_field(gateway: Gateway, data: dict[str, Any], status: int, message: str) -> None:
    answer = requests.post(f"{gateway.url}/generate", json=data, timeout=60)
    assert answer.status_code == status
    assert message in answer.json()["message"]
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_health_has_the_limits_of_the_reranker(gateway: Gateway, server: Server) -> None:
    health = requests.get(f"{gateway.url}/health", timeout=10).json()
    with Client(server.grpc) as client:
        settings = {setting.name: setting.value for setting in client.config() if setting.model == "rerank"}
    assert health == {
        "status": "healthy",
        "max_num_seqs": settings["max_num_seqs"],
        "tensor_parallel_size": settings["tensor_parallel_size"],
        "max_workers": settings["max_waiting_requests"],
    }
    assert all(isinstance(value, int) for name, value in health.items() if name != "status")


def test_status_counts_waiting_and_running_requests(gateway: Gateway, server: Server) -> None:
    """The engine has 16 slots; the instance takes a few more, and the rest waits in Triton's queue."""

    def manager() -> dict[str, int]:
        found: dict[str, int] = requests.get(f"{gateway.url}/status", timeout=20).json()["concurrent_manager"]
        return found

    assert manager()["global_queue_size"] == 0
    count = 30
    body = {"prompt": "a long one", "num_inference_steps": 100, "height": 256, "width": 256}
    with (
        httpx.Client(timeout=120, limits=httpx.Limits(max_connections=count)) as http,
        ThreadPoolExecutor(count) as pool,
    ):
        ids = [f"queued-{time.monotonic_ns()}-{number}" for number in range(count)]
        calls = [
            pool.submit(http.post, f"{gateway.url}/generate", json=body, headers={"x-request-id": each}) for each in ids
        ]
        try:
            wait_until(lambda: manager()["running_tasks"] >= 16, what="all slots to be taken")
            found = wait_until(
                lambda: (each := manager())["running_tasks"] + each["global_queue_size"] == count and each,
                what="every request to run or wait",
            )
            assert found["global_queue_size"] >= count - 16 - 4
        finally:
            with Client(server.grpc) as client:
                for each in ids:
                    client.cancel(each)
        assert {call.result().status_code for call in calls} == {499}
    wait_until(lambda: manager()["global_queue_size"] == 0, what="an empty queue")


def test_task_can_be_followed_by_its_id(gateway: Gateway) -> None:
    body = {"prompt": "a long one", "num_inference_steps": 100, "height": 256, "width": 256}

    def task() -> dict[str, Any]:
        found: dict[str, Any] = requests.get(f"{gateway.url}/task/followed", timeout=10).json()
        return found

    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(
            requests.post, f"{gateway.url}/generate", json=body, headers={"x-request-id": "followed"}, timeout=120
        )
        running = wait_until(lambda: (each := task())["state"] == "running" and each, what="the task to run")
        assert (running["model"], running["steps"]) == ("flux", 100)
        assert 0 <= running["progress"] <= 1
        assert made.result().json()["task_id"] == "followed"
    assert (task()["state"], task()["progress"]) == ("done", 1.0)
    assert requests.get(f"{gateway.url}/task/nobody", timeout=10).json()["state"] == "unknown"


def test_models_load_and_settings_are_listed(gateway: Gateway) -> None:
    models = requests.get(f"{gateway.url}/models", timeout=10).json()["models"]
    assert [(model["name"], model["state"]) for model in models] == [
        ("flux", "READY"),
        ("rerank", "READY"),
        ("tasks", "READY"),
    ]
    loads = requests.get(f"{gateway.url}/gpu/load", timeout=10).json()["instances"]
    assert [load["instance"] for load in loads] == ["flux_0_0", "rerank_0_0"]
    assert all(load.keys() == InstanceLoad.__dataclass_fields__.keys() for load in loads)
    settings = requests.get(f"{gateway.url}/config", timeout=10).json()["settings"]
    assert {setting["model"] for setting in settings} == {"flux", "rerank"}
    assert all(setting.keys() == Setting.__dataclass_fields__.keys() for setting in settings)
