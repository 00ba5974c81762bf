"""The board of tasks: states, limits, and several processes that use it or die."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from genserve_backend import board as board_module
from genserve_backend.board import BOARD_ENV, Board, default_path

HOSTILE_IDS = {
    "quotes": "'\"`",
    "sql": "x'); DROP TABLE tasks; --",
    "wildcards": "%_*?",
    "long": "\U0001f43c" * 256,
    "newline": "a\nb",
    "nul": "a\x00b",
    "path": "../../etc/passwd",
    "spaces": "  ",
}


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    board = Board(tmp_path / "board")
    yield board
    board.close()


@pytest.fixture
def add(board: Board) -> Callable[..., int]:
    def add(task_id: str = "t", *, model: str = "flux", instance: str = "flux_0") -> int:
        return board.add(task_id, model=model, instance=instance)

    return add


Add = Callable[..., int]


def state(board: Board, task_id: str = "t") -> str:
    return str(board.status(task_id)[0]["state"])


def test_task_passes_through_its_states(board: Board, add: Add) -> None:
    assert board.status("t") == (
        {"task_id": "t", "state": "unknown", "step": 0, "steps": 0, "instance": None},
        b"",
    )
    key = add()
    task, preview = board.status("t")
    assert (task["state"], task["step"], task["steps"], preview) == ("waiting", 0, 0, b"")
    assert (task["task_id"], task["model"], task["instance"], task["error"]) == ("t", "flux", "flux_0", None)
    board.progress(key, 3, 28, b"jpeg")
    task, preview = board.status("t")
    assert (task["state"], task["step"], task["steps"], preview) == ("running", 3, 28, b"jpeg")
    assert task["arrived"] <= task["changed"]
    board.finish(key, "done")
    task, preview = board.status("t")
    assert (task["state"], task["step"], task["steps"], preview) == ("done", 28, 28, b"")


@pytest.mark.parametrize("ended", ["failed", "cancelled"])
def test_unfinished_task_keeps_its_step(ended: str, board: Board, add: Add) -> None:
    key = add()
    board.progress(key, 3, 28, b"jpeg")
    board.finish(key, ended, "why")
    task, preview = board.status("t")
    assert (task["state"], task["step"], task["steps"], task["error"], preview) == (ended, 3, 28, "why", b"")


def test_empty_preview_keeps_the_last_one(board: Board, add: Add) -> None:
    key = add()
    board.progress(key, 1, 4, b"first")
    board.progress(key, 2, 4)
    assert board.status("t")[1] == b"first"
    board.progress(key, 3, 4, b"second")
    assert board.status("t")[1] == b"second"


def test_status_shows_the_newest_task_of_an_id(board: Board, add: Add) -> None:
    older, newer = add(), add(instance="flux_1")
    board.finish(older, "failed", "why")
    assert board.status("t")[0]["instance"] == "flux_1"
    assert state(board) == "waiting"
    board.finish(newer, "done")
    assert state(board) == "done"


def test_listing_has_tasks_in_flight_oldest_first(board: Board, add: Add) -> None:
    keys = [add(task_id) for task_id in "abcd"]
    board.progress(keys[3], 1, 4)
    board.finish(keys[1], "done")
    assert [(task["task_id"], task["state"]) for task in board.listing()] == [
        ("a", "waiting"),
        ("c", "waiting"),
        ("d", "running"),
    ]


def test_listing_is_bounded(board: Board, add: Add, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module, "LISTED", 2)
    for task_id in "abc":
        add(task_id)
    assert [task["task_id"] for task in board.listing()] == ["a", "b"]


def test_cancel_reaches_every_task_of_an_id_in_flight(board: Board, add: Add) -> None:
    waiting, running, finished = add(), add(), add()
    elsewhere, other = add(instance="flux_1"), add("other")
    board.progress(running, 1, 4)
    board.finish(finished, "done")
    task, _ = board.cancel("t")
    assert task["instance"] == "flux_1"
    assert board.cancel_requested("flux_0") == {waiting, running}
    assert board.cancel_requested("flux_1") == {elsewhere}
    board.finish(waiting, "cancelled")
    assert board.cancel_requested("flux_0") == {running}
    assert state(board, "other") == "waiting"
    assert other not in board.cancel_requested("flux_0")


def test_early_cancellation_applies_to_one_task(board: Board, add: Add) -> None:
    assert board.cancel("t")[0]["state"] == "unknown"
    first, second = add(), add()
    assert board.cancel_requested("flux_0") == {first}
    assert first != second


def test_cancel_of_a_finished_task_changes_nothing(board: Board, add: Add) -> None:
    board.finish(add(), "done")
    assert board.cancel("t")[0]["state"] == "done"
    add()
    assert board.cancel_requested("flux_0") == set()


def test_early_cancellation_expires(board: Board, add: Add, monkeypatch: pytest.MonkeyPatch) -> None:
    board.cancel("t")
    monkeypatch.setattr(board_module, "CANCEL_KEPT_S", -1.0)
    add()
    assert board.cancel_requested("flux_0") == set()


def test_early_cancellations_are_bounded(board: Board, add: Add, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module, "CANCELS_KEPT", 3)
    ids = [f"t{number}" for number in range(6)]
    for task_id in ids:
        board.cancel(task_id)
    keys = [add(task_id) for task_id in ids]
    assert board.cancel_requested("flux_0") == set(keys[3:])


def test_finished_tasks_expire(board: Board, add: Add, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module, "TIDY_S", 0.0)
    for task_id, ended in {"a": "done", "b": "failed", "c": "cancelled"}.items():
        board.finish(add(task_id), ended)
    add("waiting")
    monkeypatch.setattr(board_module, "FINISHED_KEPT_S", -1.0)
    add("new")
    assert [state(board, task_id) for task_id in "abc"] == ["unknown"] * 3
    assert [task["task_id"] for task in board.listing()] == ["waiting", "new"]


def test_finished_tasks_are_bounded(board: Board, add: Add, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module, "TIDY_S", 0.0)
    monkeypatch.setattr(board_module, "FINISHED_KEPT", 3)
    first = add("first")
    for number in range(10):
        board.finish(add(f"t{number}"), "done")
    add("last")
    shown = [number for number in range(10) if state(board, f"t{number}") == "done"]
    assert shown == [7, 8, 9]
    assert state(board, "first") == "waiting"
    board.finish(first, "done")


@pytest.mark.parametrize("task_id", HOSTILE_IDS.values(), ids=HOSTILE_IDS)
def test_hostile_ids_are_only_data(task_id: str, board: Board, add: Add, tmp_path: Path) -> None:
    bystander = add("bystander")
    board.cancel(task_id)
    key = add(task_id)
    assert board.status(task_id)[0]["task_id"] == task_id
    assert board.cancel_requested("flux_0") == {key}
    board.finish(key, "failed", task_id)
    assert board.status(task_id)[0]["error"] == task_id
    assert [task["task_id"] for task in board.listing()] == ["bystander"]
    assert bystander not in board.cancel_requested("flux_0")
    assert {path.name for path in tmp_path.iterdir()} <= {"board", "board-wal", "board-shm"}


def test_starting_instance_fails_only_its_own_old_tasks(board: Board, add: Add) -> None:
    add("waiting")
    board.progress(add("running"), 2, 4, b"jpeg")
    board.finish(add("done"), "done")
    add("neighbour", instance="flux_1")
    board.start_instance("flux_0")
    assert [state(board, task_id) for task_id in ("waiting", "running", "done", "neighbour")] == [
        "failed",
        "failed",
        "done",
        "waiting",
    ]
    assert board.status("running")[0]["error"] == "the instance ended"


def test_file_is_private_to_its_user(board: Board, tmp_path: Path) -> None:
    assert (tmp_path / "board").stat().st_mode & 0o077 == 0


def test_path_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BOARD_ENV, str(tmp_path / "given"))
    assert default_path() == tmp_path / "given"
    monkeypatch.setenv(BOARD_ENV, "")
    assert str(os.getppid()) in default_path().name


# Several processes.

OPEN_TOGETHER = """
import sys
from pathlib import Path
from genserve_backend.board import Board
for line in sys.stdin:
    board = Board(Path(line.strip()))
    board.start_instance(sys.argv[1])
    key = board.add(sys.argv[1], model="flux", instance=sys.argv[1])
    board.progress(key, 1, 4)
    print("ok", flush=True)
"""


@contextlib.contextmanager
def python(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run a Python process, and kill it at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def send_line(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def receive_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_processes_can_open_a_new_board_at_once(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(python(OPEN_TOGETHER, f"flux_{number}")) for number in range(4)]
        for attempt in range(100):
            path = tmp_path / f"board-{attempt}"
            for process in processes:
                send_line(process, str(path))
            assert [receive_line(process) for process in processes] == ["ok"] * 4
        board = Board(path)
        assert {task["task_id"] for task in board.listing()} == {f"flux_{number}" for number in range(4)}
        board.close()


CANCELLABLE = """
import sys, time
from pathlib import Path
from genserve_backend.board import Board
board = Board(Path(sys.argv[1]))
key = board.add("t", model="flux", instance="flux_0")
board.progress(key, 1, 4, b"jpeg")
print("running", flush=True)
while not board.cancel_requested("flux_0"):
    time.sleep(0.01)
board.finish(key, "cancelled", "why")
print("cancelled", flush=True)
"""


def test_process_can_cancel_a_task_of_another(board: Board, tmp_path: Path) -> None:
    with python(CANCELLABLE, str(tmp_path / "board")) as process:
        assert receive_line(process) == "running"
        task, preview = board.status("t")
        assert (task["state"], task["step"], preview) == ("running", 1, b"jpeg")
        board.cancel("t")
        assert receive_line(process) == "cancelled"
    assert board.status("t")[0]["error"] == "why"


WRITES_FOREVER = """
import sys
from pathlib import Path
from genserve_backend.board import Board
board = Board(Path(sys.argv[1]))
print("writing", flush=True)
number = 0
while True:
    key = board.add(f"t{number}", model="flux", instance="flux_0")
    for step in range(4):
        board.progress(key, step, 4, bytes(50_000))
    if number % 2:
        board.finish(key, "done")
    number += 1
    if number == 20:
        print("still writing", flush=True)
"""


def test_process_killed_during_a_write_leaves_a_usable_board(board: Board, tmp_path: Path) -> None:
    path = tmp_path / "board"
    for _ in range(3):
        with python(WRITES_FOREVER, str(path)) as process:
            assert receive_line(process) == "writing"
            assert receive_line(process) == "still writing"
            process.kill()
            process.wait()
        left = board.listing()
        assert left
        board.start_instance("flux_0")
        assert board.listing() == []
        assert state(board, left[-1]["task_id"]) == "failed"
        board.finish(board.add("next", model="flux", instance="flux_0"), "done")
        assert state(board, "next") == "done"
    database = sqlite3.connect(path)
    assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    database.close()
