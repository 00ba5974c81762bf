"""Batch invariance: a request's image does not depend on the server's other work."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import features
import pytest
from blocking import BlockingTransport
from conftest import PROTOCOLS, Server, wait_until
from pictures import Pixels, levels, same

from genserve import Cancelled, Client
from genserve.protocol import tasks_call

COUNT = 50


def draw_requests() -> list[dict[str, Any]]:
    draw = random.Random(3)
    return [
        {
            "prompt": f"picture {index} of {draw.choice(['a boat', 'the sea', 'an old red tram'])}",
            "negative_prompt": draw.choice(["", "", "blurry"]),
            "true_cfg_scale": draw.choice([1.5, 4.0]),
            "height": draw.choice([64, 128, 192]),
            "width": draw.choice([64, 128, 160]),
            "steps": draw.randint(1, 16),
            "guidance": draw.choice([0.0, 1.0, 3.5, 9.0]),
            "seed": draw.randrange(2**63),
        }
        for index in range(COUNT)
    ]


REQUESTS = draw_requests()


@pytest.fixture(scope="module")
def alone(running_pair: Server) -> list[Pixels]:
    """Images of requests sent one by one."""
    with Client(running_pair.grpc, timeout=120) as client:
        return [levels(client.generate(**request).data) for request in REQUESTS]


@pytest.fixture(params=PROTOCOLS)
def client(request: pytest.FixtureRequest, pair: Server) -> Iterator[Client]:
    with Client(pair.url(request.param), timeout=120) as client:
        yield client


def all_at_once(client: Client, pool: ThreadPoolExecutor) -> tuple[list[Pixels], set[str]]:
    """Send all requests in a shuffled order; return images in the order of `REQUESTS`, and the instances."""
    order = random.Random().sample(range(COUNT), COUNT)
    futures = {index: pool.submit(client.generate, **REQUESTS[index]) for index in order}
    made = [futures[index].result() for index in range(COUNT)]
    assert features.chosen.takes_turns or max(image.info["mean_batch_size"] for image in made) >= 2
    return [levels(image.data) for image in made], {image.info["instance"] for image in made}


def assert_same(alone: list[Pixels], together: list[Pixels]) -> None:
    different = [request for request, *pair in zip(REQUESTS, alone, together, strict=True) if not same(*pair)]
    assert not different


def test_concurrent_requests_do_not_change_an_image(alone: list[Pixels], client: Client) -> None:
    with ThreadPoolExecutor(COUNT) as pool:
        together, instances = all_at_once(client, pool)
    assert_same(alone, together)
    assert len(instances) == 2


def test_cancelled_neighbours_do_not_change_an_image(alone: list[Pixels], client: Client, pair: Server) -> None:
    names = [f"unwanted-{time.monotonic_ns()}-{index}" for index in range(4)]
    transport = BlockingTransport(pair.grpc)
    with ThreadPoolExecutor(COUNT + len(names)) as pool:
        unwanted = [pool.submit(client.generate, "unwanted", steps=100, task_id=name) for name in names]
        future = pool.submit(all_at_once, client, pool)
        time.sleep(1.0)
        for name in names:
            transport.infer(tasks_call("cancel", name), 10.0)
        for each in unwanted:
            with pytest.raises(Cancelled):
                each.result(60)
        assert_same(alone, future.result()[0])
    transport.close()


def test_crash_of_the_worker_does_not_change_an_image(alone: list[Pixels], client: Client, pair: Server) -> None:
    """The worker crashes with all its requests."""
    killed = threading.Event()

    def kill() -> None:
        worker = pair.worker("flux", 1)
        wait_until(lambda: any(task.state == "running" for task in client.status()[0].tasks), what="work")
        worker.kill()
        killed.set()

    with ThreadPoolExecutor(COUNT + 2) as pool:
        future = pool.submit(all_at_once, client, pool)
        pool.submit(kill).result(60)
        assert_same(alone, future.result()[0])
    assert killed.is_set()
