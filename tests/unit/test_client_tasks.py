"""Task status and cancellation on one or several servers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import genserve.retry
from genserve import Client, DeadlineExceeded, InvalidInput, ServerUnavailable, TaskStatus
from genserve.protocol import Call, Outputs
from genserve.tasks import TASKS_TIMEOUT_S


class Board:
    """Fake server with only the `tasks` model."""

    def __init__(self, url: str, **known: dict[str, Any]) -> None:
        self.url = url
        self.known = known
        self.asked: list[tuple[str, str]] = []
        self.timeouts: list[float] = []
        self.failures: list[Exception] = []

    def infer(self, call: Call, timeout_s: float) -> Outputs:
        action, task_id = (call.inputs[name].item().decode() for name in ("ACTION", "TASK_ID"))
        self.asked.append((action, task_id))
        self.timeouts.append(timeout_s)
        if self.failures:
            raise self.failures.pop(0)
        task = {"task_id": task_id, **self.known.get(task_id, {"state": "unknown", "step": 0, "steps": 0})}
        return {
            "TASK": np.array([json.dumps(task).encode()], dtype=np.object_),
            "PREVIEW": np.array([b"jpeg"], dtype=np.object_),
        }


def running(step: int = 1) -> dict[str, Any]:
    return {"state": "running", "step": step, "steps": 4, "instance": "flux_0_0", "changed": 5.0}


def ended(state: str, changed: float) -> dict[str, Any]:
    return {"state": state, "step": 4, "steps": 4, "instance": "flux_0_0", "changed": changed}


def actions(servers: Sequence[Board]) -> list[list[str]]:
    return [[action for action, _ in server.asked] for server in servers]


def clients(*servers: Any, **options: Any) -> Client:
    return Client(transport=servers, **options)


def test_task_is_found_on_the_server_that_has_it() -> None:
    servers = Board("a"), Board("b", x=running()), Board("c", x=ended("failed", 9.0))
    task = clients(*servers).task("x")
    assert (task.state, task.step, task.progress, task.preview) == ("running", 1, 0.25, b"jpeg")
    assert actions(servers) == [["status"]] * 3


def test_latest_change_decides_for_ended_tasks() -> None:
    servers = Board("a", x=ended("failed", 1.0)), Board("b", x=ended("done", 2.0)), Board("c")
    assert clients(*servers).task("x").state == "done"


def test_task_on_no_server_is_unknown() -> None:
    task = clients(Board("a"), Board("b")).task("x")
    assert (task.task_id, task.state, task.progress, task.is_in_flight) == ("x", "unknown", 0.0, False)


def test_cancel_goes_to_the_server_that_has_the_task() -> None:
    servers = Board("a"), Board("b", x=running()), Board("c", x=ended("failed", 9.0))
    assert clients(*servers).cancel("x").state == "running"
    assert actions(servers) == [["status"], ["status", "cancel"], ["status"]]


@pytest.mark.parametrize("known", [{}, {"x": ended("failed", 9.0)}], ids=["nowhere", "ended"])
def test_cancel_of_a_possibly_queued_task_goes_to_all_servers(known: dict[str, Any]) -> None:
    servers = Board("a", **known), Board("b")
    clients(*servers).cancel("x")
    assert actions(servers) == [["status", "cancel"]] * 2


@pytest.mark.parametrize("verb", ["task", "cancel"])
def test_unreachable_server_is_skipped(verb: str) -> None:
    down, up = Board("a"), Board("b", x=running())
    down.failures = [ServerUnavailable("down")]
    assert getattr(clients(down, up), verb)("x").state == "running"
    assert down.asked == [("status", "x")]


@pytest.mark.parametrize("verb", ["task", "cancel"])
def test_error_names_the_first_server_if_none_answers(verb: str) -> None:
    servers = Board("a"), Board("b")
    for server in servers:
        server.failures = [ServerUnavailable("down")]
    with pytest.raises(ServerUnavailable) as caught:
        getattr(clients(*servers), verb)("x")
    assert (caught.value.url, caught.value.model) == ("a", "tasks")


@pytest.mark.parametrize("verb", ["task", "cancel"])
def test_retry_for_covers_task_calls(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(genserve.retry, "FIRST_PAUSE_S", 0.01)
    server = Board("a", x=running())
    server.failures = [ServerUnavailable("down")] * 2
    assert getattr(clients(server, retry_for=10), verb)("x").state == "running"


def test_server_rejection_is_raised() -> None:
    server = Board("a")
    server.failures = [InvalidInput("TASK_ID is 300 characters long")]
    with pytest.raises(InvalidInput, match="300"):
        clients(server).cancel("x" * 300)


@pytest.mark.parametrize(("timeout", "longest"), [(600.0, TASKS_TIMEOUT_S), (2.0, 2.0)], ids=["default", "short"])
def test_task_call_has_a_short_timeout(timeout: float, longest: float) -> None:
    server = Board("a")
    clients(server, timeout=timeout).cancel("x")
    assert longest - 0.5 < server.timeouts[0] <= longest


def test_no_server_is_called_after_the_deadline() -> None:
    server = Board("a")
    with pytest.raises(DeadlineExceeded):
        clients(server, timeout=1e-9).task("x")
    assert server.asked == []


@pytest.mark.parametrize(
    ("state", "step", "steps", "progress"),
    [
        ("waiting", 0, 0, 0.0),
        ("running", 0, 4, 0.0),
        ("running", 3, 4, 0.75),
        ("running", 5, 4, 1.0),
        ("done", 0, 0, 1.0),
        ("failed", 1, 4, 0.25),
        ("unknown", 0, 0, 0.0),
    ],
    ids=str,
)
def test_progress_is_the_finished_fraction(state: Any, step: int, steps: int, progress: float) -> None:
    assert TaskStatus("x", state, step, steps).progress == progress
