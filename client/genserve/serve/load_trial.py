"""Trial of a model: a worker of its own loads it and answers one small request."""

from __future__ import annotations

import io
import math
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from PIL import Image

from genserve.serve.finding import in_units
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.request import MIN_SIZE
from genserve_backend.flux.request import parse as parse_flux
from genserve_backend.rerank.request import parse as parse_rerank
from genserve_backend.settings import FluxSettings, ModelSettings
from genserve_backend.worker.engine import HEARTBEAT_S
from genserve_backend.worker.link import WorkerGone, WorkerLink
from genserve_backend.worker.messages import Done, Event, Failed, Heartbeat, NotReady, Ready, Start, Submit
from genserve_backend.worker.metrics import DEVICE_MEMORY

POLL_S = 0.2
"""Interval between two readings of the worker's memory, in seconds."""
LAST_BYTES = 300
"""Most bytes of a dead worker's log in a finding."""
HEARTBEATS = 3
"""Heartbeats to wait for at the end: one of them has the memory after the request."""


class TrialError(Exception):
    """A trial that failed; the message is one line."""


@dataclass(frozen=True)
class Trial:
    """Trial of one model.

    Attributes:
        engine: The engine, as in `worker.messages.Start`.
        request: Returns the small request for the settings.
        judge: Returns a description of a result. Raises TrialError or ValueError for one that is wrong.
    """

    engine: str
    request: Callable[[Any], Any]
    judge: Callable[[Any], str]


def _flux_request(settings: FluxSettings) -> Any:
    values = {"PROMPT": "a red circle", "HEIGHT": MIN_SIZE, "WIDTH": MIN_SIZE, "STEPS": 1, "SEED": 0}
    return parse_flux(values, FluxCheckpoint.load(settings.model_path), max_pixels=settings.max_pixels)


def _judge_image(result: Any) -> str:
    with Image.open(io.BytesIO(result.image)) as image:
        image.load()
        return f"an image of {image.width} x {image.height} pixels, 1 step,"


def _judge_score(result: Any) -> str:
    (score,) = result.scores
    if not (math.isfinite(score) and 0.0 <= score <= 1.0):
        raise TrialError(f"the score of a document is {score}")
    return "a score"


TRIALS = {
    "flux": Trial("genserve_backend.flux.build:build", _flux_request, _judge_image),
    "rerank": Trial(
        "genserve_backend.rerank.build:build",
        lambda _: parse_rerank({"QUERY": "capital of France", "DOCUMENTS": ["Paris is the capital of France."]}),
        _judge_score,
    ),
}
"""The trial of each model with a checkpoint."""


def try_model(model: str, settings: ModelSettings, device: str, *, timeout_s: float) -> str:
    """Load a model on a device, make one small image or score, and return seconds and peak memory as one line.

    A worker process does the work, so a crash costs only the trial.

    Args:
        model: Name of the model, a key of `TRIALS`.
        settings: Its settings. Images are not saved.
        device: The device in torch's notation.
        timeout_s: Time limit for everything, in seconds.

    Raises:
        TrialError: The model does not load, or fails the request, within the time.
    """
    trial = TRIALS[model]
    if isinstance(settings, FluxSettings):
        settings = settings.model_copy(update={"save_test_images": None})
    request = trial.request(settings)
    with tempfile.TemporaryFile() as log:
        try:
            link = WorkerLink(Start(trial.engine, settings, device, f"{model}_doctor"), log=log)
        except OSError as error:
            raise TrialError(f"cannot start a worker: {error.strerror}") from None
        attempt = _Attempt(link, device, deadline=time.monotonic() + timeout_s)
        try:
            return attempt.run(trial, request)
        except TimeoutError:
            raise TrialError(f"not within {timeout_s:g} s: {attempt.work}; {attempt.memory}") from None
        except WorkerGone:
            pass  # its exit code is known only at its end
        finally:
            reason = link.end()
        raise TrialError(f"the worker died while {attempt.work}: {_cause(reason, log)}; {attempt.memory}")


class _Attempt:
    """One worker on its way through a trial."""

    def __init__(self, link: WorkerLink, device: str, *, deadline: float) -> None:
        self._link = link
        self._on_gpu = device.startswith("cuda")
        self._device = device
        self._deadline = deadline
        self._peak = 0
        self.work = "the model was being loaded"

    @property
    def memory(self) -> str:
        """The worker's peak memory: GPU memory, or host memory without a GPU."""
        return f"peak memory {in_units(self._peak)}" if self._peak else "peak memory unknown"

    def run(self, trial: Trial, request: Any) -> str:
        """Wait until the model is loaded, then run the request. See `try_model`."""
        started = time.monotonic()
        event = self._next(Ready, NotReady)
        if isinstance(event, NotReady):
            raise TrialError(f"the model cannot be loaded: {event.reason}; {self.memory}")
        loaded = time.monotonic()
        self.work = "a small request was running"
        self._link.send(Submit(0, "doctor", request, self._deadline))
        event = self._next(Done, Failed)
        seconds = time.monotonic() - loaded
        if isinstance(event, Failed):
            raise TrialError(f"a small request failed: {event.error.wire_message}; {self.memory}")
        try:
            made = trial.judge(event.result)
        except (OSError, ValueError) as error:
            raise TrialError(f"a small request has a wrong answer: {error}") from None
        if self._on_gpu:
            self._hear()
        return f"loaded on {self._device} in {loaded - started:.1f} s; {made} took {seconds:.2f} s; {self.memory}"

    def _next(self, *kinds: type[Event]) -> Any:
        """Return the worker's next event of these kinds.

        Raises:
            TimeoutError: There is none before the deadline.
            WorkerGone: There will be none.
        """
        while time.monotonic() < self._deadline:
            event = self._link.receive(timeout=POLL_S)
            if isinstance(event, Heartbeat) and self._on_gpu:
                self._peak = max(self._peak, int(event.gauges.get(DEVICE_MEMORY, 0)))
            elif not self._on_gpu:
                self._peak = max(self._peak, _resident_peak(self._link.pid))
            if isinstance(event, kinds):
                return event
        raise TimeoutError

    def _hear(self) -> None:
        """Wait for the heartbeats that have the memory after the request, if time allows."""
        self._deadline = min(self._deadline, time.monotonic() + HEARTBEATS * HEARTBEAT_S)
        with suppress(TimeoutError, WorkerGone):
            for _ in range(HEARTBEATS):
                self._next(Heartbeat)


def _resident_peak(pid: int) -> int:
    """Return the largest resident set that a process has had, in bytes; 0 if it is unknown."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _cause(reason: str, log: IO[bytes]) -> str:
    """Return the reason of a worker's end with the last line that it wrote."""
    if reason == "signal SIGKILL":
        reason += ", as the system ends a process if there is no memory left"
    log.seek(max(0, log.seek(0, os.SEEK_END) - LAST_BYTES))
    last = log.read().decode(errors="replace").strip().rpartition("\n")[2]
    return f"{reason} ({last})" if last else reason
