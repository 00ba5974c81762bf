"""Scheduling rules that the engines share."""

from __future__ import annotations

import time

import pytest

from genserve_backend.worker import scheduling
from genserve_backend.worker.scheduling import GrantCounter, ProgressTimer


def test_progress_is_due_once_per_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "PROGRESS_S", 0.05)
    timer = ProgressTimer()
    assert timer.is_due()
    assert not timer.is_due()
    time.sleep(0.06)
    assert timer.is_due()


def test_first_progress_waits_for_the_interval_after_last() -> None:
    assert not ProgressTimer(last=time.monotonic() + 60).is_due()


def test_arrivals_without_a_grant_use_up_later_grants() -> None:
    grants = GrantCounter()
    grants.granted(2)
    grants.arrived()
    assert grants.outstanding == 1
    grants.arrived()
    grants.arrived()
    assert grants.outstanding == 0
    grants.granted(3)
    assert grants.outstanding == 2
