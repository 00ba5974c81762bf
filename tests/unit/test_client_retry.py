"""Deadlines, backoff and Retry-After."""

from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from types import SimpleNamespace

import pytest

from genserve import retry
from genserve.errors import DeadlineExceeded, GenServeError, InvalidInput, QueueFull, ServerError, ServerUnavailable
from genserve.retry import Deadline, Retries, parse_retry_after

DOWN = ServerUnavailable("down")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Return the ranges from which pauses were drawn. Each pause is the upper end of its range."""
    ranges: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        ranges.append((low, high))
        return high

    # The module's own name: clients of other tests may still draw from `random` in their background thread.
    monkeypatch.setattr(retry, "random", SimpleNamespace(uniform=uniform))
    return ranges


def test_pauses_grow_with_full_jitter_up_to_a_limit(drawn: list[tuple[float, float]]) -> None:
    retries = Retries(60.0, Deadline(600.0))
    assert [retries.pause_after(DOWN) for _ in range(6)] == [0.25, 0.5, 1.0, 2.0, 2.0, 2.0]
    assert drawn == [(0, 0.25), (0, 0.5), (0, 1.0), (0, 2.0), (0, 2.0), (0, 2.0)]


def test_jitter_is_added_to_retry_after(drawn: list[tuple[float, float]]) -> None:
    assert Retries(60.0, Deadline(600.0)).pause_after(QueueFull("slow down", retry_after=3.0)) == 3.25
    assert drawn == [(0, 0.25)]


@pytest.mark.parametrize("error", [QueueFull("full"), ServerError("x"), InvalidInput("x")], ids=repr)
def test_other_errors_are_not_retried(error: GenServeError) -> None:
    assert Retries(60.0, Deadline(600.0)).pause_after(error) is None


@pytest.mark.parametrize(
    ("retry_for", "timeout"), [(0.0, 600.0), (0.2, 600.0), (60.0, 0.2)], ids=["none", "retry-for", "timeout"]
)
def test_pause_beyond_the_limit_gives_up(retry_for: float, timeout: float, drawn: list[tuple[float, float]]) -> None:
    assert Retries(retry_for, Deadline(timeout)).pause_after(DOWN) is None


def test_passed_deadline_raises() -> None:
    deadline = Deadline(0.05)
    assert 0 < deadline.left() <= 0.05
    time.sleep(0.06)
    with pytest.raises(DeadlineExceeded, match="no server answered in time"):
        deadline.left()


def test_huge_timeout_is_capped() -> None:
    assert 0.99e8 < Deadline(1e300).left() <= 1e8


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")], ids=str)
def test_invalid_timeout_is_rejected(timeout: float) -> None:
    with pytest.raises(InvalidInput, match="timeout is"):
        Deadline(timeout)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("7", 7.0),
        (" 120 ", 120.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        (None, None),
        ("", None),
        ("soon", None),
        ("-1", None),
        ("1.5", None),
        ("\u0663", None),
        ("Wed, 99 Oct 2015 07:28:00 GMT", None),
    ],
    ids=repr,
)
def test_retry_after_is_parsed(value: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value) == seconds


def test_retry_after_accepts_a_future_date() -> None:
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=30), usegmt=True)
    assert 28 < (parse_retry_after(date) or 0) <= 30
    assert 28 < (parse_retry_after(date.replace("GMT", "-0000")) or 0) <= 30
