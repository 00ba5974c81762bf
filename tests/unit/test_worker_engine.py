"""The worker's engine: one job after another, and whatever a job does stays its own."""

from __future__ import annotations

import threading
import time
from queue import Empty, SimpleQueue
from typing import Any

import pytest

from genserve_backend.errors import Cancelled, DeadlineExceeded, InvalidInput, OutOfMemory, RequestError, ServerError
from genserve_backend.worker import engine as engine_module
from genserve_backend.worker.engine import Handler, Job, SerialEngine
from genserve_backend.worker.messages import Beat, Done, Event, Failed, Grant, Progress, Submit

SLOTS = 3


class Running:
    """An engine at work in a thread, whose events the test reads."""

    def __init__(self, handle: Handler) -> None:
        self._events: SimpleQueue[Event] = SimpleQueue()
        self.granted = 0
        self.beats = 0
        self.engine = SerialEngine(handle, self._hear, slots=SLOTS)
        threading.Thread(target=self.engine.run, daemon=True).start()

    def _hear(self, event: Event) -> None:
        if isinstance(event, Grant):
            self.granted += event.count
        elif isinstance(event, Beat):
            self.beats += 1
        else:
            self._events.put(event)

    def submit(self, job: int, request: Any = None, *, within_s: float = 60.0) -> None:
        self.engine.submit(Submit(job, f"task-{job}", request, time.monotonic() + within_s))

    def event(self) -> Event:
        return self._events.get(timeout=10)

    def error(self, job: int) -> RequestError:
        event = self.event()
        assert isinstance(event, Failed)
        assert event.job == job
        return event.error

    def has_event(self) -> bool:
        try:
            self._events.get(timeout=0.05)
        except Empty:
            return False
        return True


def echo(request: Any, job: Job) -> Any:
    return request


def gated(gate: threading.Event, started: threading.Event) -> Handler:
    """Works until `gate` is set, looking up now and then."""

    def handle(request: Any, job: Job) -> Any:
        started.set()
        while not gate.wait(0.005):
            job.check()
        return request

    return handle


@pytest.fixture
def gate() -> threading.Event:
    return threading.Event()


@pytest.fixture
def started() -> threading.Event:
    return threading.Event()


def test_jobs_run_in_the_order_they_came() -> None:
    running = Running(echo)
    for job in range(50):
        running.submit(job, job * 2)
    assert [running.event() for _ in range(50)] == [Done(job, job * 2) for job in range(50)]


def test_one_job_at_a_time(gate: threading.Event, started: threading.Event) -> None:
    running = Running(gated(gate, started))
    running.submit(0)
    assert started.wait(10)
    running.submit(1)
    assert not running.has_event()
    gate.set()
    assert running.event() == Done(0, None)
    assert running.event() == Done(1, None)


def test_an_ended_job_makes_room_for_another(gate: threading.Event, started: threading.Event) -> None:
    running = Running(gated(gate, started))
    running.submit(0)
    running.submit(1)
    assert started.wait(10)
    assert running.granted == SLOTS
    gate.set()
    running.event()
    running.event()
    running.submit(2)
    running.event()
    assert running.granted in (SLOTS + 2, SLOTS + 3)  # the last one's grant may be on its way


def test_an_engine_beats_idle_and_while_its_handler_gets_on(
    gate: threading.Event, started: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "BEAT_S", 0.02)
    running = Running(gated(gate, started))
    time.sleep(0.3)
    idle = running.beats
    assert idle > 2
    running.submit(0)
    assert started.wait(10)
    time.sleep(0.3)
    assert running.beats > idle + 2


def test_an_engine_whose_handler_hangs_does_not_beat(started: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "BEAT_S", 0.02)
    end = threading.Event()

    def hang(request: Any, job: Job) -> None:
        started.set()
        end.wait(10)

    running = Running(hang)
    running.submit(0)
    assert started.wait(10)
    beats = running.beats
    time.sleep(0.3)
    assert running.beats == beats
    end.set()


def test_progress_names_its_job() -> None:
    def handle(request: Any, job: Job) -> Any:
        job.progress(1, 2)
        job.progress(2, 2, b"preview")
        return request

    running = Running(handle)
    running.submit(7, "result")
    assert [running.event() for _ in range(3)] == [Progress(7, 1, 2), Progress(7, 2, 2, b"preview"), Done(7, "result")]


def test_cancelled_before_it_starts(gate: threading.Event, started: threading.Event) -> None:
    seen = []

    def handle(request: Any, job: Job) -> Any:
        seen.append(request)
        return gated(gate, started)(request, job)

    running = Running(handle)
    running.submit(0, "first")
    assert started.wait(10)
    running.submit(1, "cancelled")
    running.submit(2, "last")
    running.engine.cancel(1)
    gate.set()
    assert running.event() == Done(0, "first")
    assert isinstance(running.error(1), Cancelled)
    assert running.event() == Done(2, "last")
    assert seen == ["first", "last"]


def test_cancelled_while_it_runs(gate: threading.Event, started: threading.Event) -> None:
    running = Running(gated(gate, started))
    running.submit(0)
    running.submit(1, "next")
    assert started.wait(10)
    running.engine.cancel(0)
    assert isinstance(running.error(0), Cancelled)
    gate.set()
    assert running.event() == Done(1, "next")


def test_cancelling_the_unknown_and_the_done_does_nothing() -> None:
    running = Running(echo)
    running.engine.cancel(5)
    running.submit(0, "a")
    assert running.event() == Done(0, "a")
    running.engine.cancel(0)
    running.submit(1, "b")
    assert running.event() == Done(1, "b")


@pytest.mark.parametrize("within_s", [-1.0, 0.1], ids=["before-it-starts", "while-it-runs"])
def test_deadline(within_s: float, gate: threading.Event, started: threading.Event) -> None:
    running = Running(gated(gate, started))
    running.submit(0, within_s=within_s)
    assert isinstance(running.error(0), DeadlineExceeded)
    assert started.is_set() == (within_s > 0)
    gate.set()
    running.submit(1, "next")
    assert running.event() == Done(1, "next")


@pytest.mark.parametrize(
    "raised",
    [
        ValueError("secret"),
        KeyError("secret"),
        RuntimeError("CUDA error: secret\nline"),
        MemoryError(),
        RecursionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_arbitrary_exception_becomes_a_server_error(raised: Exception, caplog: pytest.LogCaptureFixture) -> None:
    def handle(request: Any, job: Job) -> Any:
        if request == "bad":
            raise raised
        return request

    running = Running(handle)
    running.submit(0, "bad")
    running.submit(1, "good")
    error = running.error(0)
    assert type(error) is ServerError
    assert type(raised).__name__ in str(error)
    assert "secret" not in str(error)
    assert "\n" not in str(error)
    assert running.event() == Done(1, "good")
    (record,) = caplog.records
    assert record.exc_info is not None
    assert vars(record)["fields"] == {"task_id": "task-0"}


@pytest.mark.parametrize("raised", [InvalidInput("x"), OutOfMemory("x")], ids=lambda error: type(error).__name__)
def test_a_request_error_stays_itself(raised: RequestError) -> None:
    def handle(request: Any, job: Job) -> Any:
        raise raised

    running = Running(handle)
    running.submit(0)
    assert running.error(0) is raised


def test_waiting_is_measured_from_arrival(gate: threading.Event, started: threading.Event) -> None:
    def handle(request: Any, job: Job) -> Any:
        waited_s = job.waited_s
        gated(gate, started)(request, job)
        return waited_s

    running = Running(handle)
    running.submit(0)
    assert started.wait(10)
    running.submit(1)
    time.sleep(0.1)
    gate.set()
    first, second = running.event(), running.event()
    assert isinstance(first, Done)
    assert isinstance(second, Done)
    assert second.result >= 0.1
    assert first.result < second.result
