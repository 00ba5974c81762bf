"""Instances and settings on the board: load, readiness, limits, and files of an earlier version."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from genserve_backend import board as board_module
from genserve_backend.board import Board, Memory

EARLIER_SCHEMA = """
CREATE TABLE tasks (
    key INTEGER PRIMARY KEY, task_id TEXT NOT NULL, model TEXT NOT NULL, instance TEXT NOT NULL, state TEXT NOT NULL,
    step INTEGER NOT NULL DEFAULT 0, steps INTEGER NOT NULL DEFAULT 0, error TEXT, preview BLOB NOT NULL DEFAULT x'',
    cancel INTEGER NOT NULL DEFAULT 0, arrived REAL NOT NULL, changed REAL NOT NULL
);
CREATE INDEX tasks_by_id ON tasks (task_id, key);
CREATE INDEX tasks_by_state ON tasks (state, changed);
CREATE TABLE cancelled_early (task_id TEXT PRIMARY KEY, at REAL NOT NULL);
CREATE TABLE loads (
    instance TEXT PRIMARY KEY, model TEXT NOT NULL, load REAL NOT NULL, has_room INTEGER NOT NULL, at REAL NOT NULL
);
"""
"""The tables of a board before it had instances and settings."""


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    board = Board(tmp_path / "board")
    yield board
    board.close()


def report(board: Board, instance: str = "flux_0_0", **changes: Any) -> None:
    state = {"model": "flux", "device": "cpu", "gpu_id": None, "memory": Memory(1, 2, 3), "ready": True, **changes}
    board.set_instance(instance, **state)


def instances(board: Board) -> list[str]:
    return [load["instance"] for load in board.load()]


def test_instance_is_listed_with_every_field(board: Board) -> None:
    report(board, "flux_0_1", device="cuda:1", gpu_id=1, memory=Memory(2**40, 2**41, 2**42))
    assert board.load() == [
        {
            "instance": "flux_0_1",
            "model": "flux",
            "device": "cuda:1",
            "gpu_id": 1,
            "running": 0,
            "waiting": 0,
            "memory_used": 2**40,
            "memory_free": 2**41,
            "memory_total": 2**42,
            "ready": True,
        }
    ]


def test_unknown_memory_is_null(board: Board) -> None:
    report(board, memory=Memory())
    (load,) = board.load()
    assert (load["gpu_id"], load["memory_used"], load["memory_free"], load["memory_total"]) == (None,) * 4


def test_last_report_counts(board: Board) -> None:
    report(board, ready=False)
    report(board, memory=Memory(5))
    (load,) = board.load()
    assert (load["ready"], load["memory_used"]) == (True, 5)


def test_tasks_are_counted_by_state_and_instance(board: Board) -> None:
    report(board, "flux_0_0")
    report(board, "flux_0_1")
    keys = [board.add(f"t{number}", model="flux", instance="flux_0_0") for number in range(4)]
    board.progress(keys[0], 1, 4)
    board.finish(keys[1], "done")
    board.progress(board.add("other", model="flux", instance="flux_0_1"), 1, 4)
    counts = {load["instance"]: (load["running"], load["waiting"]) for load in board.load()}
    assert counts == {"flux_0_0": (1, 2), "flux_0_1": (1, 0)}


def test_instances_are_listed_by_model_and_name(board: Board) -> None:
    report(board, "rerank_0_0", model="rerank")
    report(board, "flux_0_1")
    report(board, "flux_0_0")
    assert instances(board) == ["flux_0_0", "flux_0_1", "rerank_0_0"]


def test_instance_without_a_worker_is_listed_as_not_ready(board: Board) -> None:
    report(board, ready=False)
    assert [load["ready"] for load in board.load()] == [False]


def test_instance_without_a_sign_of_life_is_not_ready_and_then_gone(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    report(board)
    monkeypatch.setattr(board_module, "INSTANCE_READY_S", -1.0)
    assert [load["ready"] for load in board.load()] == [False]
    monkeypatch.setattr(board_module, "INSTANCE_KEPT_S", -1.0)
    assert board.load() == []


def test_gone_instances_are_deleted_by_the_next_report(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(50):
        report(board, f"flux_0_{number}")
    monkeypatch.setattr(board_module, "INSTANCE_KEPT_S", -1.0)
    report(board, "flux_1_0")
    database = sqlite3.connect(tmp_path / "board")
    assert database.execute("SELECT count(*) FROM instances").fetchone() == (0,)
    database.close()


def test_removed_instance_is_not_listed(board: Board) -> None:
    report(board, "flux_0_0")
    report(board, "flux_0_1")
    board.remove_instance("flux_0_0")
    assert instances(board) == ["flux_0_1"]


def test_listing_is_bounded(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module, "LISTED", 2)
    for number in range(3):
        report(board, f"flux_0_{number}")
    assert instances(board) == ["flux_0_0", "flux_0_1"]


# Settings.


def test_settings_are_listed_in_their_order(board: Board) -> None:
    given = [("b", 1.5, "default"), ("a", [[0, 1]], "config.pbtxt"), ("c", None, "environment C")]
    board.set_settings("flux", given)
    report(board)
    assert board.config() == [
        {"model": "flux", "name": name, "value": value, "source": source} for name, value, source in given
    ]


def test_settings_of_a_model_are_replaced(board: Board) -> None:
    report(board)
    report(board, "rerank_0_0", model="rerank")
    board.set_settings("rerank", [("a", 1, "default")])
    board.set_settings("flux", [("a", 1, "default"), ("b", 1, "default")])
    board.set_settings("flux", [("b", 2, "default")])
    listed = [(setting["model"], setting["name"], setting["value"]) for setting in board.config()]
    assert listed == [("flux", "b", 2), ("rerank", "a", 1)]


def test_settings_of_a_model_without_an_instance_are_not_listed(board: Board) -> None:
    board.set_settings("flux", [("a", 1, "default")])
    assert board.config() == []
    report(board)
    assert len(board.config()) == 1
    board.remove_instance("flux_0_0")
    assert board.config() == []


def test_settings_are_bounded(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module, "SETTINGS_KEPT", 3)
    report(board)
    report(board, "rerank_0_0", model="rerank")
    board.set_settings("rerank", [("a", 1, "default")])
    for _ in range(5):  # a restarted instance replaces its own, and none of another model's
        board.set_settings("flux", [("a", 1, "default"), ("b", 1, "default")])
    assert len(board.config()) == 3
    board.set_settings("flux", [(str(number), 1, "default") for number in range(10)])
    assert [setting["name"] for setting in board.config()] == ["7", "8", "9"]


@pytest.mark.parametrize("value", ["x" * 100_000, '"' * 100_000, list(range(50_000))], ids=["text", "quotes", "list"])
def test_long_value_is_cut(value: Any, board: Board) -> None:
    report(board)
    board.set_settings("flux", [("a", value, "default")])
    (setting,) = board.config()
    assert setting["value"].endswith("...")
    assert len(json.dumps(setting["value"])) <= board_module.SETTING_CHARACTERS


@pytest.mark.parametrize(
    ("value", "listed"),
    [(float("inf"), "inf"), ("\udc80/x", "\udc80/x"), ("a'; DROP TABLE settings; --", "a'; DROP TABLE settings; --")],
    ids=["infinity", "no-utf-8", "sql"],
)
def test_unusual_value_is_listed_as_json(value: Any, listed: Any, board: Board) -> None:
    report(board)
    board.set_settings("flux", [("a", value, "default")])
    assert json.loads(json.dumps(board.config(), allow_nan=False))[0]["value"] == listed


# Files of an earlier version.


def test_earlier_board_gets_the_new_tables(tmp_path: Path) -> None:
    path = tmp_path / "board"
    database = sqlite3.connect(path)
    database.executescript(EARLIER_SCHEMA)
    database.execute("INSERT INTO tasks VALUES (1, 't', 'flux', 'flux_0_0', 'running', 1, 4, NULL, x'', 0, 1.0, 1.0)")
    database.execute("INSERT INTO loads VALUES ('flux_0_0', 'flux', 1.0, 1, 1.0)")
    database.commit()
    database.close()
    board = Board(path)
    report(board)
    board.set_settings("flux", [("a", 1, "default")])
    board.set_load("flux_0_0", model="flux", load=1.0, has_room=True)
    assert board.status("t")[0]["state"] == "running"
    assert [load["running"] for load in board.load()] == [1]
    assert len(board.config()) == 1
    board.close()
