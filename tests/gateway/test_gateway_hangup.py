"""Callers that hang up in the middle of a request: real sockets, and gateways that use gRPC and HTTP."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from conftest import PROTOCOLS, Server, wait_until
from gateways import Gateway, running_gateway

from genserve import Client, TaskStatus

STEPS = 50
LARGE = {"height": 1024, "width": 1024, "num_inference_steps": STEPS}
"""An image with steps that are much longer than a report of progress or a cancellation."""
LARGE_SIZE = {"size": "1024x1024", "num_inference_steps": STEPS}
FOUR = {"size": "512x512", "num_inference_steps": STEPS, "n": 4}
IMAGES = "/v1/images/generations"
POLL_S = 0.02


@pytest.fixture(scope="module", params=PROTOCOLS)
def running(
    request: pytest.FixtureRequest, running_server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), running_server.url(request.param)) as gateway:
        yield gateway


@pytest.fixture
def gateway(running: Gateway, server: Server) -> Gateway:
    return running


def new_id() -> str:
    return f"hangup-{time.monotonic_ns()}"


def sent(gateway: Gateway, path: str, body: dict[str, Any], task_id: str) -> socket.socket:
    """Return the socket of a request that has been sent."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nX-Request-Id: {task_id}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", gateway.port), timeout=30)
    connection.sendall(head.encode() + content)
    return connection


def begun_step(client: Client, task_id: str) -> int:
    """Wait for the beginning of a step, not the first one; return the number of finished steps."""
    first = wait_until(lambda: running_task(client, task_id), what="the task to run")
    deadline = time.monotonic() + 60
    while (task := client.task(task_id)).step <= max(first.step, 1):
        assert task.is_in_flight, task
        assert time.monotonic() < deadline
        time.sleep(POLL_S)
    return task.step


def running_task(client: Client, task_id: str) -> TaskStatus | None:
    task = client.task(task_id)
    return task if task.state == "running" and task.step > 0 else None


def ended(client: Client, task_id: str) -> TaskStatus:
    def look() -> TaskStatus | None:
        task = client.task(task_id)
        return None if task.is_in_flight else task

    found: TaskStatus = wait_until(look, timeout_s=30, what="the end of the task")
    return found


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", LARGE),
        (IMAGES, LARGE_SIZE),
        (IMAGES, {**LARGE_SIZE, "stream": True}),
        (IMAGES, {**LARGE_SIZE, "stream": True, "partial_images": 3}),
        (IMAGES, FOUR),
        (IMAGES, {**FOUR, "stream": True}),
    ],
    ids=["generate", "images", "stream", "previews", "four", "four-stream"],
)
def test_image_ends_with_its_step(gateway: Gateway, grpc_client: Client, path: str, body: dict[str, Any]) -> None:
    task_id = new_id()
    ids = [task_id, *(f"{task_id}-{number}" for number in range(1, body.get("n", 1)))]
    with closing(sent(gateway, path, {"prompt": "a red circle", **body}, task_id)):
        wait_until(lambda: all(running_task(grpc_client, each) for each in ids), what="all images to run")
        begun_step(grpc_client, task_id)
        steps = {each: grpc_client.task(each).step for each in ids}  # images of a request may begin a step apart
    for each in ids:
        task = ended(grpc_client, each)
        assert task.state == "cancelled"
        assert task.step <= steps[each] + 1
        assert task.steps == STEPS


def test_ranking_ends_with_its_forward(gateway: Gateway, grpc_client: Client) -> None:
    task_id = new_id()
    documents = [f"document {number} of {task_id}: " + "words about rivers and bridges " * 40 for number in range(1000)]
    with closing(sent(gateway, "/v2/rerank", {"query": "rivers", "documents": documents}, task_id)):
        wait_until(lambda: running_task(grpc_client, task_id), what="the ranking to run")
    task = ended(grpc_client, task_id)
    assert task.state == "cancelled"
    assert 0 < task.step < task.steps / 2
    assert grpc_client.rerank("rivers", ["bridges"]).scores


def test_request_that_waits_for_a_slot_never_runs(gateway: Gateway, grpc_client: Client) -> None:
    """The engine runs 8,192 image tokens at once: eight images of this size."""
    blocking = [grpc_client.submit("in the way", steps=100, height=512, width=512) for _ in range(8)]
    try:
        wait_until(lambda: all(task.progress().state == "running" for task in blocking), what="no free slot")
        task_id = new_id()
        with closing(sent(gateway, "/generate", {"prompt": "a red circle"}, task_id)):
            time.sleep(1.0)
        time.sleep(0.5)
    finally:
        for task in blocking:
            task.cancel()
    grpc_client.generate("behind it", steps=1, priority="low")
    task = grpc_client.task(task_id)
    assert (task.state, task.step) in {("cancelled", 0), ("unknown", 0)}  # at its instance, or in Triton's queue
