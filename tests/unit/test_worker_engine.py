"""What all engines share: signs of life, the end of a job, and what callers hear of a defect."""

from __future__ import annotations

import time

import pytest

from genserve_backend.errors import Cancelled, DeadlineExceeded
from genserve_backend.worker import engine as engine_module
from genserve_backend.worker.engine import Job, Pulse, defect
from genserve_backend.worker.messages import Beat, Event, Progress, Submit


def new_job(events: list[Event] | None = None, *, within_s: float = 60.0) -> Job:
    submit = Submit(7, "task-7", None, time.monotonic() + within_s)
    return Job(submit, (events if events is not None else []).append)


def test_a_pulse_beats_at_most_once_in_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "BEAT_S", 0.05)
    events: list[Event] = []
    pulse = Pulse(events.append, lambda: Beat({"running": len(events)}))
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        pulse.beat()
    assert 2 <= len(events) <= 11
    assert events[1] == Beat({"running": 1})


def test_a_job_goes_on_until_it_is_cancelled() -> None:
    job = new_job()
    assert job.end() is None
    job.cancelled = True
    assert isinstance(job.end(), Cancelled)


def test_a_job_ends_at_its_deadline() -> None:
    assert isinstance(new_job(within_s=-1).end(), DeadlineExceeded)


def test_progress_names_its_job() -> None:
    events: list[Event] = []
    job = new_job(events)
    job.progress(1, 2)
    job.progress(2, 2, b"preview")
    assert events == [Progress(7, 1, 2), Progress(7, 2, 2, b"preview")]


@pytest.mark.parametrize("raised", [ValueError("secret"), RuntimeError("CUDA error: secret\nline"), MemoryError()])
def test_a_defect_is_named_and_tells_no_secrets(raised: Exception) -> None:
    error = str(defect(raised))
    assert type(raised).__name__ in error
    assert "secret" not in error
    assert "\n" not in error
