"""An engine for the supervisor's tests, which does what requests say; its worker processes import this file by name."""

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
from genserve_backend.worker.engine import BEAT_S, Emit, Job, Pulse, defect
from genserve_backend.worker.messages import Beat, Done, Event, Failed, Grant, Submit
from genserve_backend.worker.threads import start_thread

BROKEN_ENV = "WORKER_HANDLERS_BROKEN"
ONCE_ENV = "WORKER_HANDLERS_ONCE"
"""A file that the first worker to fail in the scripted way creates; later ones work."""
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
    """The scripted engine in a worker that is stopped half-way through its first large message."""
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
    """The scripted engine with a helper thread that fails in a way that is no Exception, for each request "panic"."""
    engine = build_scripted(settings, device, emit)
    requests: SimpleQueue[Submit] = SimpleQueue()
    submit = engine.submit

    def read() -> None:
        while True:
            request = requests.get()
            if request.request[0] == "panic" and (request.request[1] == "always" or first_time()):
                raise Panic("thread panicked in Rust")
            submit(request)

    engine.submit = requests.put
    start_thread(read, name="read")
    return engine


def build_stalling(settings: FluxSettings, device: str, emit: Emit) -> SerialEngine:
    """The scripted engine beside a helper thread that never gets on."""
    started = time.monotonic()
    engine = build_scripted(settings, device, emit)
    engine.pulse = Pulse(emit, lambda: Beat(stalled_s=time.monotonic() - started))
    return engine


class Panic(BaseException):
    """Like pyo3's PanicException, no Exception."""


def first_time() -> bool:
    """Whether this is the first call of all workers."""
    try:
        Path(os.environ[ONCE_ENV]).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class SerialEngine:
    """Runs one job after another, and beats only while its handler looks up."""

    def __init__(self, handle: Callable[[Any, Job, Callable[[], None]], Any], emit: Emit, *, slots: int) -> None:
        self._handle = handle
        self._emit = emit
        self._slots = slots
        self.pulse = Pulse(emit)
        self._jobs: dict[int, Job] = {}
        self._queue: SimpleQueue[Job] = SimpleQueue()

    def submit(self, submit: Submit) -> None:
        job = self._jobs[submit.job] = Job(submit, self._emit)
        self._queue.put(job)

    def cancel(self, job_id: int) -> None:
        if job := self._jobs.get(job_id):
            job.cancelled = True

    def run(self) -> None:
        self._emit(Grant(self._slots))
        while True:
            self.pulse.beat()
            with contextlib.suppress(Empty):
                job = self._queue.get(timeout=BEAT_S)
                self._emit(self._answer(job))
                self._emit(Grant(1))

    def _answer(self, job: Job) -> Event:
        def check() -> None:
            self.pulse.beat()
            if error := job.end():
                raise error

        try:
            check()
            return Done(job.submit.job, self._handle(job.submit.request, job, check))
        except RequestError as error:
            return Failed(job.submit.job, error)
        except Exception as error:
            return Failed(job.submit.job, defect(error))


class Scripted:
    """Does what a request says: a verb and its argument."""

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
        """Says that it runs, then works until the file `gate` is there."""
        job.progress(0, 1)
        while not Path(gate).exists():
            check()
            time.sleep(0.005)
        return "held"

    def hang(self, gate: str, job: Job, _check: Callable[[], None]) -> str:
        """The same, without ever looking at its deadline."""
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
