"""Durable tasks of two gateways with one database, before two servers, while some of them are killed or stopped."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import wait_until

from simulated.fleet import SimulatedServer, fleet
from simulated.gateways import Caller, gateways
from simulated.load import draw_requests
from studies import gateway_tasks

STEP_S = 0.03


@pytest.fixture(scope="module")
def servers() -> Iterator[list[SimulatedServer]]:
    with fleet([STEP_S] * 2) as servers:
        yield servers


def test_every_task_has_one_right_result_whatever_is_killed(servers: list[SimulatedServer], tmp_path: Path) -> None:
    requests = draw_requests(60, steps=(6, 10))
    outcome = gateway_tasks.run(tmp_path, servers, requests, kills=3, seed=1)
    assert (outcome.right, outcome.faults) == (60, [])
    assert [name.partition("-")[0] for name in outcome.kills] == ["gateway", "simulated", "gateway"]
    assert outcome.repeated > 0


def test_stopped_gateway_ends_at_once_and_its_task_runs_elsewhere(
    servers: list[SimulatedServer], tmp_path: Path
) -> None:
    """Also with a caller that follows the task."""
    with gateways(tmp_path, [servers[0].url("grpc")], 2) as (one, other):
        other.kill()
        caller = Caller([one])
        (request,) = draw_requests(1, steps=(100,))
        task_id = caller.submit(0, request)
        events: list[str] = []
        following = threading.Thread(target=follow, args=(f"{one.url}/v1/tasks/{task_id}/events", events))
        following.start()
        wait_until(lambda: any("step" in event for event in events), what="an event of the task")
        one.terminate()
        following.join(10)
        assert not following.is_alive()
        other.start()
        # Far sooner than a lease ends: the task is in the queue.
        done = wait_until(lambda: finished(Caller([other]), task_id), what="the end of the task")
        assert (done["state"], done["attempts"]) == ("done", 2)
        assert gateway_tasks.is_right(Caller([other]).file(done["result"]["url"]), request)


def follow(url: str, events: list[str]) -> None:
    """Add the data of all events until the stream ends."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        events.extend(line.decode() for line in answer if line.startswith(b"data: "))


def finished(caller: Caller, task_id: str) -> dict[str, object] | None:
    task = json.loads(caller.ask("GET", f"/v1/tasks/{task_id}").data)
    return None if task["state"] in {"queued", "running"} else task
