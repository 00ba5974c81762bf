"""Common parts of the engines: heartbeats, jobs and unexpected errors."""

from __future__ import annotations

import time

import pytest

from genserve_backend.errors import Cancelled, DeadlineExceeded
from genserve_backend.worker import engine as engine_module
from genserve_backend.worker.engine import HeartbeatTimer, Job, defect
from genserve_backend.worker.messages import Done, Event, Failed, Heartbeat, Progress, Submit
from genserve_backend.worker.metrics import RUNNING


def new_job(events: list[Event] | None = None, *, within_s: float = 60.0) -> Job:
    submit = Submit(7, "task-7", None, time.monotonic() + within_s)
    return Job(submit, (events if events is not None else []).append)


def test_heartbeat_timer_emits_once_per_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "HEARTBEAT_S", 0.05)
    events: list[Event] = []
    timer = HeartbeatTimer(events.append, lambda: Heartbeat({RUNNING: len(events)}))
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        timer.beat()
    assert 2 <= len(events) <= 11
    assert events[1] == Heartbeat({RUNNING: 1})


def test_cancelled_job_has_a_stop_reason() -> None:
    job = new_job()
    assert job.stop_reason() is None
    job.cancel()
    assert isinstance(job.stop_reason(), Cancelled)


def test_job_past_its_deadline_has_a_stop_reason() -> None:
    assert isinstance(new_job(within_s=-1).stop_reason(), DeadlineExceeded)


def test_job_events_carry_its_id() -> None:
    events: list[Event] = []
    job = new_job(events)
    job.progress(1, 2)
    job.progress(2, 2, b"preview")
    job.done("result")
    job.fail(error := Cancelled("enough"))
    assert events == [Progress(7, 1, 2), Progress(7, 2, 2, b"preview"), Done(7, "result"), Failed(7, error)]


@pytest.mark.parametrize("raised", [ValueError("secret"), RuntimeError("CUDA error: secret\nline"), MemoryError()])
def test_unexpected_error_exposes_only_its_type(raised: Exception) -> None:
    error = str(defect(raised))
    assert type(raised).__name__ in error
    assert "secret" not in error
    assert "\n" not in error
