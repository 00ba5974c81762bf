"""Presence of an instance on the board, with a supervisor and its real workers."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from worker_handlers import BROKEN_ENV

from genserve_backend.adapter import presence as presence_module
from genserve_backend.adapter.place import Place
from genserve_backend.adapter.presence import Presence
from genserve_backend.board import Board, Memory
from genserve_backend.settings import FluxSettings
from genserve_backend.worker.callbacks import NoMonitor
from genserve_backend.worker.link import WORKER_PATH_ENV
from genserve_backend.worker.messages import Heartbeat, Start
from genserve_backend.worker.metrics import DEVICE_MEMORY, MEMORY_GAUGES, RUNNING, memory_gauges, memory_of
from genserve_backend.worker.supervisor import Supervisor

PLACE = Place("flux", "flux_0_0", "cuda:2", 2, {}, Path("/models"))
PATIENCE_S = 30.0


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    board = Board(tmp_path / "board")
    yield board
    board.close()


@pytest.fixture
def presence(board: Board) -> Presence:
    return Presence(board, PLACE)


def listed(board: Board) -> dict[str, Any]:
    (load,) = board.load()
    return load


@pytest.mark.parametrize("memory", [Memory(1, 2, 3), Memory(1), Memory()], ids=str)
def test_memory_travels_as_gauges(memory: Memory) -> None:
    gauges = memory_gauges(memory)
    assert set(gauges) <= set(MEMORY_GAUGES)
    assert memory_of({RUNNING: 5, **gauges}) == memory


def test_place_and_memory_are_published(presence: Presence, board: Board) -> None:
    presence.update(memory_gauges(Memory(1, 2, 3)))
    presence.publish(ready=True)
    assert listed(board) == {
        "instance": "flux_0_0",
        "model": "flux",
        "device": "cuda:2",
        "gpu_id": 2,
        "running": 0,
        "waiting": 0,
        "memory_used": 1,
        "memory_free": 2,
        "memory_total": 3,
        "ready": True,
    }


def test_memory_of_a_lost_worker_is_unknown(presence: Presence, board: Board) -> None:
    presence.update(memory_gauges(Memory(1, 2, 3)))
    presence.publish(ready=True)
    presence.publish(ready=False)
    assert (listed(board)["ready"], listed(board)["memory_used"]) == (False, None)
    presence.publish(ready=True)
    assert (listed(board)["ready"], listed(board)["memory_used"]) == (True, None)


def test_only_news_are_published_at_once(presence: Presence, board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence_module, "PUBLISH_S", 3600.0)
    presence.publish(ready=True)
    presence.update({DEVICE_MEMORY: 1})
    presence.publish(ready=True)  # the first size after a start
    assert listed(board)["memory_used"] == 1
    presence.update({DEVICE_MEMORY: 2})
    presence.publish(ready=True)
    assert listed(board)["memory_used"] == 1
    monkeypatch.setattr(presence_module, "PUBLISH_S", 0.0)
    presence.publish(ready=True)
    assert listed(board)["memory_used"] == 2


def test_board_that_cannot_be_written_is_only_logged(
    presence: Presence, board: Board, caplog: pytest.LogCaptureFixture
) -> None:
    board.close()
    presence.publish(ready=True)
    assert "cannot write the board" in caplog.text


# With a supervisor.


class PresenceMonitor(NoMonitor):
    """Monitor that publishes the presence, as an instance's."""

    def __init__(self, presence: Presence) -> None:
        self._presence = presence

    def on_heartbeat(self, beat: Heartbeat) -> None:
        self._presence.update(beat.gauges)

    def on_poll(self, *, ready: bool) -> None:
        self._presence.publish(ready=ready)


def wait_until(condition: Callable[[], bool], *, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@pytest.fixture
def supervisor(presence: Presence, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    monkeypatch.setenv(WORKER_PATH_ENV, os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))
    settings = FluxSettings(model_path=Path("/nowhere"), threads=1)
    supervisor = Supervisor(Start("worker_handlers:build_scripted", settings, "cpu", "flux_0_0"))
    supervisor.start(PresenceMonitor(presence))
    yield supervisor
    supervisor.close()


def test_instance_is_not_ready_until_its_worker_is_replaced(
    supervisor: Supervisor, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_until(lambda: listed(board)["ready"], what="ready after the start")
    monkeypatch.setenv(BROKEN_ENV, "broken")  # for the workers that follow
    assert supervisor.worker_pid is not None
    os.kill(supervisor.worker_pid, signal.SIGKILL)
    wait_until(lambda: not listed(board)["ready"], what="not ready without a worker")
    monkeypatch.delenv(BROKEN_ENV)
    wait_until(lambda: listed(board)["ready"], what="ready with another worker")


def test_instance_gives_signs_of_life_while_no_worker_starts(
    supervisor: Supervisor, board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence_module, "PUBLISH_S", 0.0)
    monkeypatch.setenv(BROKEN_ENV, "broken")
    assert supervisor.worker_pid is not None
    os.kill(supervisor.worker_pid, signal.SIGKILL)
    wait_until(lambda: not listed(board)["ready"], what="not ready without a worker")
    board.remove_instance("flux_0_0")
    wait_until(lambda: bool(board.load()), what="a sign of life")
    assert not listed(board)["ready"]
