"""Load balancing between the instances of a model."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import pytest

from genserve_backend import board as board_module
from genserve_backend.adapter import balance as balance_module
from genserve_backend.adapter.balance import Balance
from genserve_backend.board import Board


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "board"


def instance(path: Path, number: int, *, model: str = "flux", has_room: bool = True) -> Balance:
    balance = Balance(Board(path), model, f"{model}_{number}", lambda: has_room)
    balance.publish()
    return balance


def test_idle_instance_goes_first(path: Path) -> None:
    busy, idle = instance(path, 0), instance(path, 1)
    assert not busy.should_yield()
    busy.set(1, 100.0)
    assert busy.should_yield()
    assert not idle.should_yield()
    idle.set(2, 1.0)
    assert not busy.should_yield()
    idle.drop(2)
    assert busy.should_yield()


def test_instance_waits_if_its_backlog_is_larger_by_more_than_a_request(path: Path) -> None:
    one, other = instance(path, 0), instance(path, 1)
    other.set(1, 10.0)
    for key in range(2):
        one.set(key, 10.0)
    assert not one.should_yield()
    one.set(2, 10.0)
    assert one.should_yield()
    assert not other.should_yield()
    one.drop(0)
    assert not one.should_yield()


def test_equal_backlogs_do_not_wait(path: Path) -> None:
    one, other = instance(path, 0), instance(path, 1)
    one.set(1, 5.0)
    other.set(1, 5.0)
    assert not one.should_yield()
    assert not other.should_yield()


def test_progress_reduces_the_backlog(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance_module, "PUBLISH_S", 0.0)
    one, other = instance(path, 0), instance(path, 1)
    for balance in (one, other):
        balance.set(1, 10.0)
        balance.set(2, 10.0)
    assert not one.should_yield()
    other.set(1, 3.0)
    other.set(2, 6.0)
    assert one.should_yield()


@pytest.mark.parametrize(
    ("model", "has_room"), [("rerank", True), ("flux", False)], ids=["another-model", "one-that-is-full"]
)
def test_instance_does_not_wait_for(path: Path, model: str, has_room: bool) -> None:
    busy = instance(path, 0)
    instance(path, 1, model=model, has_room=has_room)
    busy.set(1, 1.0)
    assert not busy.should_yield()


def test_instance_does_not_wait_for_one_that_is_gone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = instance(path, 0)
    gone = instance(path, 1)
    busy.set(1, 1.0)
    assert busy.should_yield()
    monkeypatch.setattr(board_module, "LOAD_KEPT_S", 0.05)
    time.sleep(0.1)
    assert not busy.should_yield()
    gone.publish()
    assert busy.should_yield()


def test_broken_board_leaves_the_choice_to_triton(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    balance = instance(path, 0)
    instance(path, 1)
    monkeypatch.setattr(Board, "set_load", broken)
    monkeypatch.setattr(Board, "has_less_loaded", broken)
    balance.set(1, 1.0)
    assert not balance.should_yield()
    assert len(caplog.records) == 2
