"""The supervisor with real worker processes that work, hang, crash and lose their parent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from worker_handlers import BROKEN_ENV, ONCE_ENV

from genserve_backend.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidInput,
    RequestError,
    ServerError,
    ServerUnavailable,
)
from genserve_backend.settings import FluxSettings
from genserve_backend.worker import supervisor as supervisor_module
from genserve_backend.worker.link import WORKER_PATH_ENV, exit_reason
from genserve_backend.worker.messages import Start
from genserve_backend.worker.supervisor import Supervisor, WorkerStartError

SLOTS = 4
PATIENCE_S = 30.0


class Recorder:
    """A task that records its callbacks."""

    def __init__(self, task_id: str) -> None:
        self.task_id = task_id
        self.cancelled = False
        self.progress: list[tuple[int, int, bytes]] = []
        self.outcomes: list[Any] = []
        self.running = threading.Event()
        self.heard = threading.Event()
        self.ended = threading.Event()
        self.ended_s = 0.0

    def is_cancelled(self) -> bool:
        if self.cancelled:
            self.heard.set()
        return self.cancelled

    def on_progress(self, step: int, steps: int, preview: bytes) -> None:
        self.progress.append((step, steps, preview))
        self.running.set()

    def on_done(self, result: Any) -> None:
        self._end(result)

    def on_failed(self, error: RequestError) -> None:
        self._end(error)

    def _end(self, outcome: Any) -> None:
        self.outcomes.append(outcome)
        self.ended_s = time.monotonic()
        self.ended.set()

    def outcome(self) -> Any:
        assert self.ended.wait(PATIENCE_S), f"{self.task_id} was never answered"
        return self.outcomes[0]


Submit = Callable[..., Recorder]


def make(factory: str = "build_scripted", *, slots: int = SLOTS, **settings: Any) -> Supervisor:
    values = FluxSettings(model_path=Path("/nowhere"), threads=1, max_running=slots, **settings)
    return Supervisor(Start(f"worker_handlers:{factory}", values, "cpu", "flux_0"))


def submitter(supervisor: Supervisor, recorders: list[Recorder]) -> Submit:
    def submit(verb: str, argument: Any = None, *, within_s: float = 60.0) -> Recorder:
        recorder = Recorder(f"{verb}-{len(recorders)}")
        recorders.append(recorder)
        supervisor.submit(recorder, (verb, argument), deadline=time.monotonic() + within_s)
        return recorder

    return submit


def is_gone(pid: int) -> bool:
    """Return whether a process has ended; a zombie has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    give_up = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.01)
    return True


def in_background(first: Callable[[], None], *, then: Callable[[], None]) -> None:
    def both() -> None:
        first()
        then()

    threading.Thread(target=both, daemon=True).start()


def kill_worker(supervisor: Supervisor) -> None:
    pid = supervisor.worker_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: supervisor.worker_pid != pid, PATIENCE_S)


@pytest.fixture(scope="module", autouse=True)
def worker_path() -> Iterator[None]:
    """Let the workers import `worker_handlers`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(WORKER_PATH_ENV, os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))
        yield


@pytest.fixture(scope="module")
def shared() -> Iterator[Supervisor]:
    supervisor = make()
    supervisor.start()
    yield supervisor
    supervisor.close()


@pytest.fixture
def submit(shared: Supervisor) -> Iterator[Submit]:
    """Return a submit function for the shared supervisor; every request ends exactly once by the end of the test."""
    recorders: list[Recorder] = []
    yield submitter(shared, recorders)
    for recorder in recorders:
        recorder.outcome()
    assert [len(recorder.outcomes) for recorder in recorders] == [1] * len(recorders)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """Return the path of a file that ends every `hold` and `hang` once it exists."""
    yield tmp_path / "gate"
    (tmp_path / "gate").touch()


def test_answers_arrive_in_order(submit: Submit) -> None:
    tasks = [submit("echo", {"number": number}) for number in range(20)]
    assert [task.outcome() for task in tasks] == [{"number": number} for number in range(20)]
    assert [task.ended_s for task in tasks] == sorted(task.ended_s for task in tasks)


def test_worker_is_a_separate_process_on_its_device(shared: Supervisor, submit: Submit) -> None:
    assert submit("where").outcome() == (shared.worker_pid, "cpu")
    assert shared.worker_pid != os.getpid()


def test_progress_reaches_the_task(submit: Submit) -> None:
    task = submit("steps", 3)
    assert task.outcome() == "stepped"
    assert task.progress == [(1, 3, b""), (2, 3, b""), (3, 3, b"preview")]


def test_full_instance_blocks_until_a_slot_is_free(shared: Supervisor, submit: Submit, gate: Path) -> None:
    shared.wait_for_slot()
    tasks = [submit("hold", str(gate)) for _ in range(SLOTS)]
    through = threading.Event()
    in_background(shared.wait_for_slot, then=through.set)
    assert not through.wait(0.3)
    tasks[0].cancelled = True
    assert through.wait(5)
    assert isinstance(tasks[0].outcome(), Cancelled)
    assert [task.ended.is_set() for task in tasks[1:]] == [False] * (SLOTS - 1)


def test_unexpected_exception_fails_only_its_request(submit: Submit) -> None:
    bad, good = submit("fail", "secret"), submit("echo", "good")
    assert type(bad.outcome()) is ServerError
    assert str(bad.outcome()) == "KeyError in the engine; see the server's log"
    assert good.outcome() == "good"


def test_request_error_crosses_the_process_boundary(submit: Submit) -> None:
    error = submit("refuse", "STEPS is 0; allowed: 1 to 100").outcome()
    assert type(error) is InvalidInput
    assert error.wire_message == "InvalidInput: STEPS is 0; allowed: 1 to 100"


def test_running_request_can_be_cancelled(submit: Submit, gate: Path) -> None:
    running, queued = submit("hold", str(gate)), submit("echo", "next")
    assert running.running.wait(PATIENCE_S)
    running.cancelled = True
    assert type(running.outcome()) is Cancelled
    assert queued.outcome() == "next"


def test_queued_request_can_be_cancelled(submit: Submit, gate: Path) -> None:
    running, queued, last = submit("hold", str(gate)), submit("steps", 3), submit("echo", "last")
    queued.cancelled = True
    assert running.running.wait(PATIENCE_S)
    assert queued.heard.wait(PATIENCE_S)
    time.sleep(0.1)  # the cancellation is on its way to the worker
    gate.touch()
    assert running.outcome() == "held"
    assert type(queued.outcome()) is Cancelled
    assert queued.progress == []
    assert last.outcome() == "last"


def test_running_request_fails_at_its_deadline(submit: Submit, gate: Path) -> None:
    running, queued = submit("hold", str(gate), within_s=0.3), submit("echo", "next")
    assert type(running.outcome()) is DeadlineExceeded
    assert running.progress
    assert queued.outcome() == "next"


def test_queued_request_fails_at_its_deadline(submit: Submit, gate: Path) -> None:
    running, queued = submit("hold", str(gate)), submit("steps", 3, within_s=0.1)
    time.sleep(0.2)
    gate.touch()
    assert running.outcome() == "held"
    assert type(queued.outcome()) is DeadlineExceeded
    assert queued.progress == []


def test_supervisor_enforces_deadlines_if_the_engine_does_not(
    submit: Submit, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "DEADLINE_GRACE_S", 0.1)
    hung, queued, last = submit("hang", str(gate), within_s=0.2), submit("echo", 1, within_s=0.2), submit("echo", 2)
    assert type(hung.outcome()) is DeadlineExceeded
    assert type(queued.outcome()) is DeadlineExceeded
    assert not last.ended.is_set()
    gate.touch()
    assert last.outcome() == 2


def test_stopped_worker_does_not_block_submit(shared: Supervisor, submit: Submit) -> None:
    worker = psutil.Process(shared.worker_pid)
    large = "x" * 5_000_000
    worker.suspend()
    try:
        started = time.monotonic()
        task = submit("echo", large)
        assert time.monotonic() - started < 1.0
        time.sleep(0.2)
        assert not task.ended.is_set()
    finally:
        worker.resume()
    assert task.outcome() == large


def test_requests_in_flight_survive_a_worker_death(shared: Supervisor, submit: Submit, gate: Path) -> None:
    before = shared.worker_pid
    in_flight = [submit("hold", str(gate)), submit("echo", 1), submit("echo", 2)]
    assert in_flight[0].running.wait(PATIENCE_S)
    kill_worker(shared)
    # These arrive while the next worker loads.
    cancelled, late, patient = submit("echo", 3), submit("echo", 4, within_s=0.2), submit("echo", 5)
    cancelled.cancelled = True
    assert type(cancelled.outcome()) is Cancelled
    assert type(late.outcome()) is DeadlineExceeded
    gate.touch()
    assert [task.outcome() for task in in_flight] == ["held", 1, 2]
    assert patient.outcome() == 5
    assert submit("where").outcome()[0] == shared.worker_pid != before


def test_request_that_kills_workers_fails_alone(shared: Supervisor, submit: Submit, gate: Path) -> None:
    before = submit("hold", str(gate))
    killer = submit("crash")
    behind = [submit("echo", number) for number in range(5)]
    gate.touch()
    assert before.outcome() == "held"
    assert type(killer.outcome()) is ServerError
    assert "died 2 times" in str(killer.outcome())
    assert [task.outcome() for task in behind] == list(range(5))
    shared.wait_for_slot()
    assert submit("echo", "next").outcome() == "next"


def test_failed_restart_fails_waiting_requests_until_a_restart_succeeds(
    shared: Supervisor, submit: Submit, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "RESTART_BACKOFF_S", (0.0, 0.1))
    monkeypatch.setenv(BROKEN_ENV, "the disk is gone")
    running, queued = submit("hold", str(gate)), submit("echo", 1)
    assert running.running.wait(PATIENCE_S)
    kill_worker(shared)
    for task in (running, queued):
        assert type(task.outcome()) is ServerUnavailable
        assert "the disk is gone" in str(task.outcome())
    monkeypatch.delenv(BROKEN_ENV)
    shared.wait_for_slot()
    assert submit("echo", "back").outcome() == "back"


def test_hung_worker_is_replaced(gate: Path) -> None:
    supervisor = make(hang_timeout_s=2.0)
    supervisor.start()
    try:
        submit = submitter(supervisor, [])
        hung = psutil.Process(supervisor.worker_pid)
        running = submit("hold", str(gate))
        assert running.running.wait(PATIENCE_S)
        time.sleep(2.5)  # longer than the timeout, but with heartbeats
        assert supervisor.worker_pid == hung.pid
        hung.suspend()
        queued = submit("echo", "queued")
        gate.touch()
        assert running.outcome() == "held"
        assert queued.outcome() == "queued"
        assert supervisor.worker_pid != hung.pid
        assert is_gone(hung.pid)
    finally:
        supervisor.close()


def test_worker_stopped_inside_a_large_answer_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ONCE_ENV, str(tmp_path / "stopped"))
    supervisor = make("build_stopping", hang_timeout_s=2.0)
    supervisor.start()
    try:
        submit = submitter(supervisor, [])
        stopped = psutil.Process(supervisor.worker_pid)
        large = submit("echo", b"x" * 20_000_000)
        assert wait_until(lambda: stopped.status() == psutil.STATUS_STOPPED, PATIENCE_S)
        since = time.monotonic()
        # The supervisor still handles cancellations and deadlines.
        cancelled, late = submit("hold", "/none"), submit("echo", 1, within_s=0.2)
        cancelled.cancelled = True
        assert cancelled.heard.wait(0.5)
        assert type(late.outcome()) is DeadlineExceeded
        assert wait_until(lambda: is_gone(stopped.pid), 4.0)
        assert time.monotonic() - since < 2.0 + 1.0
        assert large.outcome() == b"x" * 20_000_000
        assert submit("where").outcome()[0] != stopped.pid
    finally:
        supervisor.close()


def test_close_does_not_wait_for_a_worker_stopped_inside_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ONCE_ENV, str(tmp_path / "stopped"))
    supervisor = make("build_stopping")
    supervisor.start()
    stopped = psutil.Process(supervisor.worker_pid)
    large = submitter(supervisor, [])("echo", b"x" * 20_000_000)
    assert wait_until(lambda: stopped.status() == psutil.STATUS_STOPPED, PATIENCE_S)
    started = time.monotonic()
    supervisor.close()
    assert time.monotonic() - started < 2.0
    assert type(large.outcome()) is ServerUnavailable


def test_panicking_worker_thread_causes_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ONCE_ENV, str(tmp_path / "panicked"))
    supervisor = make("build_panicking")
    supervisor.start()
    try:
        submit = submitter(supervisor, [])
        before = supervisor.worker_pid
        tasks = [submit("panic"), submit("echo", 1), submit("echo", 2)]
        assert [task.outcome() for task in tasks] == ["calm", 1, 2]
        assert supervisor.worker_pid != before
        hopeless, next_one = submit("panic", "always"), submit("echo", 3)
        assert type(hopeless.outcome()) is ServerError
        assert next_one.outcome() == 3
    finally:
        supervisor.close()


def test_stalled_helper_thread_counts_as_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even while heartbeats, progress and other answers continue."""
    supervisor = make("build_stalling", hang_timeout_s=2.0)
    supervisor.start()
    try:
        before = supervisor.worker_pid
        submit = submitter(supervisor, [])
        started = time.monotonic()
        while supervisor.worker_pid == before:
            assert submit("echo", 1).outcome() == 1
            assert time.monotonic() - started < 8.0
            time.sleep(0.02)
    finally:
        supervisor.close()


def test_close_ends_the_worker_and_fails_requests_in_flight(gate: Path) -> None:
    supervisor = make(slots=1)
    supervisor.start()
    recorders: list[Recorder] = []
    submit = submitter(supervisor, recorders)
    running = submit("hold", str(gate))
    submit("echo", 1)
    assert running.running.wait(PATIENCE_S)
    pid = supervisor.worker_pid
    assert pid is not None
    through = threading.Event()
    in_background(supervisor.wait_for_slot, then=through.set)
    supervisor.close()
    assert not psutil.pid_exists(pid)
    assert [[type(outcome) for outcome in recorder.outcomes] for recorder in recorders] == [[ServerUnavailable]] * 2
    assert through.wait(5)


@pytest.mark.parametrize(
    ("factory", "settings", "reason"),
    [
        ("build_without_checkpoint", {}, "no checkpoint folder at /nowhere (set FLUX_MODEL_PATH)"),
        ("build_broken", {}, "ValueError: first line"),
        ("build_crashing", {}, "signal SIGKILL"),
        ("build_scripted", {"start_timeout_s": 0.2}, "the model was not loaded within 0.2 s"),
    ],
    ids=["no-checkpoint", "exception", "crash", "timeout"],
)
def test_failed_start_reports_its_reason(factory: str, settings: dict[str, Any], reason: str) -> None:
    supervisor = make(factory, **settings)
    with pytest.raises(WorkerStartError) as caught:
        supervisor.start()
    assert str(caught.value) == reason
    pid = supervisor.worker_pid
    assert pid is not None
    assert not psutil.pid_exists(pid)
    supervisor.close()


PARENT = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from genserve_backend.settings import FluxSettings
from genserve_backend.worker.messages import Start
from genserve_backend.worker.supervisor import Supervisor

settings = FluxSettings(model_path=Path("/nowhere"), threads=1)
start = Start("worker_handlers:build_scripted", settings, "cpu", "flux_0")
supervisors = [Supervisor(start) for _ in range(2)]
with ThreadPoolExecutor() as pool:
    list(pool.map(Supervisor.start, supervisors))
print(*[supervisor.worker_pid for supervisor in supervisors], flush=True)
time.sleep(600)
"""


def test_workers_end_when_their_parent_is_killed() -> None:
    """This includes a stopped worker, which cannot notice the end by itself."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            running, stopped = map(int, parent.stdout.readline().split())
            os.kill(stopped, signal.SIGSTOP)
            assert not is_gone(running)
            parent.kill()
            parent.wait()
            assert wait_until(lambda: is_gone(running), 5)
            assert wait_until(lambda: is_gone(stopped), 5)
        finally:
            parent.kill()
            for pid in (running, stopped):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


class RaisingRecorder(Recorder):
    """A task that records its callbacks, and raises in each of them."""

    def is_cancelled(self) -> bool:
        raise RuntimeError("is_cancelled")

    def on_progress(self, step: int, steps: int, preview: bytes) -> None:
        raise RuntimeError("on_progress")

    def on_done(self, result: Any) -> None:
        super().on_done(result)
        raise RuntimeError("on_done")


def test_raising_callback_affects_only_its_request(shared: Supervisor, submit: Submit) -> None:
    before = shared.worker_pid
    faulty = RaisingRecorder("faulty")
    shared.submit(faulty, ("steps", 3), deadline=time.monotonic() + 60)
    assert submit("echo", "well").outcome() == "well"
    assert faulty.outcome() == "stepped"
    assert shared.worker_pid == before


def test_request_after_close_is_answered() -> None:
    supervisor = make()
    supervisor.start()
    supervisor.close()
    late = submitter(supervisor, [])("echo", 1)
    assert isinstance(late.outcome(), ServerUnavailable)


def test_worker_stopped_during_loading_is_replaced() -> None:
    supervisor = make(hang_timeout_s=2.0)

    def start() -> None:
        with contextlib.suppress(WorkerStartError):
            supervisor.start()

    threading.Thread(target=start, daemon=True).start()
    try:
        assert wait_until(lambda: supervisor.worker_pid is not None, PATIENCE_S)
        stopped = supervisor.worker_pid
        assert stopped is not None
        os.kill(stopped, signal.SIGSTOP)
        assert wait_until(lambda: is_gone(stopped), 4.0)
    finally:
        supervisor.close()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(11, "Resource temporarily unavailable"), "Resource temporarily unavailable"),
        (subprocess.SubprocessError("Bad exception data from child"), "SubprocessError"),
    ],
    ids=["refused", "empty-handshake"],
)
def test_unstartable_process_is_a_failed_start(error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(start: Start) -> None:
        raise error

    monkeypatch.setattr(supervisor_module, "WorkerLink", refuse)
    with pytest.raises(WorkerStartError, match=f"cannot start a process: {reason}"):
        make().start()


@pytest.mark.parametrize(
    ("code", "reason"),
    [(0, "exit code 0"), (70, "exit code 70"), (-9, "signal SIGKILL"), (-40, "signal 40"), (-200, "signal 200")],
    ids=str,
)
def test_exit_reason_describes_the_end_of_a_process(code: int, reason: str) -> None:
    assert exit_reason(code) == reason


def test_worker_killed_by_a_nameless_signal_is_replaced() -> None:
    supervisor = make()
    supervisor.start()
    try:
        pid = supervisor.worker_pid
        assert pid is not None
        os.kill(pid, 40)
        assert submitter(supervisor, [])("echo", 1).outcome() == 1
        assert wait_until(lambda: supervisor.worker_pid != pid, PATIENCE_S)
        assert submitter(supervisor, [])("echo", 2).outcome() == 2
    finally:
        supervisor.close()
