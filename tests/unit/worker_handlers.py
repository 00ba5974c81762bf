"""Engines for the supervisor's tests; their worker processes import this file by its name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from genserve_backend.checkpoints import CheckpointError
from genserve_backend.errors import InvalidInput
from genserve_backend.settings import FluxSettings
from genserve_backend.worker.engine import Emit, Job, SerialEngine

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


class Scripted:
    """Does what a request says: a verb and its argument."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, request: tuple[str, Any], job: Job) -> Any:
        verb, argument = request
        return getattr(self, verb)(argument, job)

    def echo(self, value: Any, _job: Job) -> Any:
        return value

    def where(self, _argument: None, _job: Job) -> tuple[int, str]:
        return os.getpid(), self.device

    def steps(self, count: int, job: Job) -> str:
        for step in range(1, count + 1):
            job.progress(step, count, b"preview" if step == count else b"")
        return "stepped"

    def hold(self, gate: str, job: Job) -> str:
        """Says that it runs, then works until the file `gate` is there."""
        job.progress(0, 1)
        while not Path(gate).exists():
            job.check()
            time.sleep(0.005)
        return "held"

    def hang(self, gate: str, job: Job) -> str:
        """The same, without ever looking at its deadline."""
        job.progress(0, 1)
        while not Path(gate).exists():
            time.sleep(0.005)
        return "hung"

    def crash(self, _argument: None, _job: Job) -> None:
        die()

    def fail(self, text: str, _job: Job) -> None:
        raise KeyError(text)

    def refuse(self, text: str, _job: Job) -> None:
        raise InvalidInput(text)
