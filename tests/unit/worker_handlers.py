"""A scripted engine for the supervisor's tests: a request names the behavior. Workers import this file by name."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from genserve_backend.checkpoints import CheckpointError
from genserve_backend.errors import InvalidInput, RequestError
from genserve_backend.settings import FluxSettings
from genserve_backend.worker.engine import HEARTBEAT_S, Emit, HeartbeatTimer, Job, defect
from genserve_backend.worker.messages import Grant, Heartbeat, Submit
from genserve_backend.worker.threads import start_thread

BROKEN_ENV = "WORKER_HANDLERS_BROKEN"
ONCE_ENV = "WORKER_HANDLERS_ONCE"
"""A file that the first worker creates when it fails as scripted; later workers do not fail."""
LARGE_BYTES = 10 * 2**20


def build_scripted(settings: FluxSettings, device: str, emit: Emit) -> SerialEngine:
    if os.environ.get(BROKEN_ENV):
        raise CheckpointError(os.environ[BROKEN_ENV])
    return SerialEngine(Scripted(device), emit, slots=settings.max_running)


def build_without_checkpoint(settings: FluxSettings, _device: str, _emit: Emit) -> SerialEngine:
    raise CheckpointError(f"no checkpoint folder at {settings.model_path} (set FLUX_MODEL_PATH)")


def build_broken(_settings: FluxSettings, _device: str, _emit: Emit) -> SerialEngine:
    raise ValueError("first line\nsecond line")


def build_crashing(_settings: FluxSettings, _device: str, _emit: Emit) -> SerialEngine:
    die()
    raise AssertionError


def build_stopping(settings: FluxSettings, device: str, emit: Emit) -> SerialEngine:
    """Build the scripted engine in a worker that stops halfway through its first large message."""
    send = Connection._send

    def send_half(connection: Connection, data: Any, *arguments: Any) -> None:
        if len(data) < LARGE_BYTES or not first_time():
            return send(connection, data, *arguments)
        send(connection, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGSTOP)
        raise AssertionError("resumed")

    Connection._send = send_half
    return build_scripted(settings, device, emit)


def build_panicking(settings: FluxSettings, device: str, emit: Emit) -> SerialEngine:
    """Build the scripted engine with a helper thread that raises a BaseException for each request "panic"."""
    engine = build_scripted(settings, device, emit)
    requests: SimpleQueue[Submit] = SimpleQueue()
    submit = engine.submit

    def forward() -> None:
        while True:
            request = requests.get()
            if request.request[0] == "panic" and (request.request[1] == "always" or first_time()):
                raise Panic("thread panicked in Rust")
            submit(request)

    engine.submit = requests.put
    start_thread(forward, name="forward")
    return engine


def build_stalling(settings: FluxSettings, device: str, emit: Emit) -> SerialEngine:
    """Build the scripted engine with a helper thread that is always stalled."""
    started = time.monotonic()
    engine = build_scripted(settings, device, emit)
    engine.heartbeat_timer = HeartbeatTimer(emit, lambda: Heartbeat(stalled_s=time.monotonic() - started))
    return engine


class Panic(BaseException):
    """A BaseException that is no Exception, like pyo3's PanicException."""


def first_time() -> bool:
    """Return whether this is the first call in all workers."""
    try:
        Path(os.environ[ONCE_ENV]).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class SerialEngine:
    """Engine that runs one job at a time; it sends heartbeats only while its handler calls `check`."""

    def __init__(self, handle: Callable[[Any, Job, Callable[[], None]], Any], emit: Emit, *, slots: int) -> None:
        self._handle = handle
        self._emit = emit
        self._slots = slots
        self.heartbeat_timer = HeartbeatTimer(emit)
        self._jobs: dict[int, Job] = {}
        self._queue: SimpleQueue[Job] = SimpleQueue()

    def submit(self, submit: Submit) -> None:
        job = self._jobs[submit.job_id] = Job(submit, self._emit)
        self._queue.put(job)

    def cancel(self, job_id: int) -> None:
        if job := self._jobs.get(job_id):
            job.cancel()

    def run(self) -> None:
        self._emit(Grant(self._slots))
        while True:
            self.heartbeat_timer.beat()
            with contextlib.suppress(Empty):
                job = self._queue.get(timeout=HEARTBEAT_S)
                self._answer(job)
                self._emit(Grant(1))

    def _answer(self, job: Job) -> None:
        def check() -> None:
            self.heartbeat_timer.beat()
            if error := job.stop_reason():
                raise error

        try:
            check()
            job.done(self._handle(job.request, job, check))
        except RequestError as error:
            job.fail(error)
        except Exception as error:
            job.fail(defect(error))


class Scripted:
    """Handler of requests, each a verb and its argument."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, request: tuple[str, Any], job: Job, check: Callable[[], None]) -> Any:
        verb, argument = request
        return getattr(self, verb)(argument, job, check)

    def echo(self, value: Any, *_: Any) -> Any:
        return value

    def where(self, *_: Any) -> tuple[int, str]:
        return os.getpid(), self.device

    def steps(self, count: int, job: Job, _check: Callable[[], None]) -> str:
        for step in range(1, count + 1):
            job.progress(step, count, b"preview" if step == count else b"")
        return "stepped"

    def hold(self, gate: str, job: Job, check: Callable[[], None]) -> str:
        """Report progress, then work until the file `gate` exists."""
        job.progress(0, 1)
        while not Path(gate).exists():
            check()
            time.sleep(0.005)
        return "held"

    def hang(self, gate: str, job: Job, _check: Callable[[], None]) -> str:
        """The same, without checking the deadline or sending heartbeats."""
        job.progress(0, 1)
        while not Path(gate).exists():
            time.sleep(0.005)
        return "hung"

    def panic(self, *_: Any) -> str:
        return "calm"

    def crash(self, *_: Any) -> None:
        die()

    def fail(self, text: str, *_: Any) -> None:
        raise KeyError(text)

    def refuse(self, text: str, *_: Any) -> None:
        raise InvalidInput(text)
