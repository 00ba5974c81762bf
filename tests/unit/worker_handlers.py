"""An engine for the supervisor's tests, which does what requests say; its worker processes import this file by name."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from genserve_backend.checkpoints import CheckpointError
from genserve_backend.errors import InvalidInput, RequestError
from genserve_backend.settings import FluxSettings
from genserve_backend.worker.engine import BEAT_S, Emit, Job, Pulse, defect
from genserve_backend.worker.messages import Done, Event, Failed, Grant, Submit

BROKEN_ENV = "WORKER_HANDLERS_BROKEN"


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


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class SerialEngine:
    """Runs one job after another, and beats only while its handler looks up."""

    def __init__(self, handle: Callable[[Any, Job, Callable[[], None]], Any], emit: Emit, *, slots: int) -> None:
        self._handle = handle
        self._emit = emit
        self._slots = slots
        self._pulse = Pulse(emit)
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
            self._pulse.beat()
            with contextlib.suppress(Empty):
                job = self._queue.get(timeout=BEAT_S)
                self._emit(self._answer(job))
                self._emit(Grant(1))

    def _answer(self, job: Job) -> Event:
        def check() -> None:
            self._pulse.beat()
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

    def crash(self, *_: Any) -> None:
        die()

    def fail(self, text: str, *_: Any) -> None:
        raise KeyError(text)

    def refuse(self, text: str, *_: Any) -> None:
        raise InvalidInput(text)
