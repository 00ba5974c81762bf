"""Reports of the FLUX engine: progress and previews for callers, metrics for operators."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from queue import SimpleQueue

import torch

from genserve_backend.devices import limit_threads, memory
from genserve_backend.flux.decode import Decoder
from genserve_backend.flux.lora.adapters import Adapters
from genserve_backend.flux.metrics import (
    ADAPTER_BYTES,
    ADAPTER_EVICTIONS,
    ADAPTER_LOADS,
    ADAPTERS,
    BATCH_SIZE,
    DECODE_SECONDS,
    DECODING,
    DENOISE_SECONDS,
    ENCODE_SECONDS,
    EXPIRED,
    PREEMPTIONS,
    REFUSED,
    SKIPPED_STEPS,
    STEPS,
)
from genserve_backend.flux.preview import Previewer
from genserve_backend.flux.state import ImageState
from genserve_backend.worker.engine import Emit, HeartbeatTimer
from genserve_backend.worker.messages import Heartbeat
from genserve_backend.worker.metrics import RUNNING, WAITING, Counter, memory_gauges
from genserve_backend.worker.threads import start_thread

MIN_PREVIEW_S, MAX_PREVIEW_S = 0.1, 1.0
"""Limits of the interval between two previews of an image, in seconds."""
PREVIEW_SHARE = 0.005
"""Share of the preview thread's time that previews take, within those limits."""

logger = logging.getLogger(__name__)


class Reporter:
    """Progress, previews and metrics. Nearly all of the work happens outside the engine's thread.

    Args:
        previewer: Turns latents into small pictures.
        decoder: Its backlog and its seconds are reported.
        adapters: Their number and their memory are reported.
        device: Its memory is reported.
        emit: Receives the heartbeats.
    """

    def __init__(
        self, previewer: Previewer, decoder: Decoder, adapters: Adapters, *, device: torch.device, emit: Emit
    ) -> None:
        self._previewer = previewer
        self._decoder = decoder
        self._adapters = adapters
        self._device = device
        self._heartbeat_timer = HeartbeatTimer(emit, self._heartbeat)
        self._counts: defaultdict[Counter, float] = defaultdict(float)
        self._batch_sizes: list[int] = []
        self._running = self._waiting = 0
        self._previewed = 0.0
        self._preview_s = MIN_PREVIEW_S
        self._previews: SimpleQueue[list[tuple[ImageState, int, torch.Tensor]]] = SimpleQueue()
        start_thread(self._preview, name="preview")

    def stepped(self, images: int, seconds: float, *, skipped: int = 0) -> None:
        """Count a forward for `images` images that took `seconds`, and was skipped for `skipped` of them."""
        self._counts[STEPS] += images
        self._counts[SKIPPED_STEPS] += skipped
        self._counts[DENOISE_SECONDS] += seconds
        self._batch_sizes.append(images)

    def encoded(self, seconds: float) -> None:
        """Count the seconds of an encoding of prompts."""
        self._counts[ENCODE_SECONDS] += seconds

    def preempted(self) -> None:
        """Count an image that lost its slot to a more urgent one."""
        self._counts[PREEMPTIONS] += 1

    def refused(self) -> None:
        """Count an image that was refused because it could not be finished by its deadline."""
        self._counts[REFUSED] += 1

    def expired(self) -> None:
        """Count an image that was not finished by its deadline."""
        self._counts[EXPIRED] += 1

    def report(self, running: Sequence[ImageState], waiting: Sequence[ImageState]) -> None:
        """Send what is due: progress, previews and a heartbeat. Call it after every step."""
        self._running, self._waiting = len(running), len(waiting)
        for image in running:
            if image.step and image.progress_timer.is_due():
                image.job.progress(image.step, image.request.steps)
        now = time.monotonic()
        if now - self._previewed >= self._preview_s and self._previews.empty():
            self._previewed = now
            # Tensors are replaced, never modified in place, so the preview thread may read these at any time.
            self._previews.put(
                [(image, image.step, estimate) for image in running if (estimate := _estimate(image)) is not None]
            )
        self._heartbeat_timer.beat()

    def _preview(self) -> None:
        limit_threads()
        with torch.inference_mode():
            while True:
                estimates = self._previews.get()
                started = time.monotonic()
                for image, step, estimate in estimates:
                    request = image.request
                    try:
                        jpeg = self._previewer.jpeg(estimate, request.height, request.width)
                    except Exception:
                        logger.exception("preview failed", extra={"fields": {"task_id": image.job.task_id}})
                    else:
                        image.job.progress(step, request.steps, jpeg)
                seconds = (time.monotonic() - started) / PREVIEW_SHARE
                self._preview_s = min(max(MIN_PREVIEW_S, seconds), MAX_PREVIEW_S)

    def _heartbeat(self) -> Heartbeat:
        gauges = {
            RUNNING: self._running,
            WAITING: self._waiting,
            DECODING: self._decoder.pending,
            ADAPTERS: self._adapters.count,
            ADAPTER_BYTES: self._adapters.nbytes,
            **memory_gauges(memory(self._device)),
        }
        counts = {
            **self._counts,
            DECODE_SECONDS: self._decoder.pop_seconds(),
            ADAPTER_LOADS: self._adapters.pop_loads(),
            ADAPTER_EVICTIONS: self._adapters.pop_evictions(),
        }
        observations = {BATCH_SIZE: tuple(self._batch_sizes)}
        self._counts.clear()
        self._batch_sizes.clear()
        return Heartbeat(gauges, counts, observations, stalled_s=max(self._decoder.busy_s(), self._adapters.busy_s()))


def _estimate(image: ImageState) -> torch.Tensor | None:
    """Return the final latents if the velocity stayed constant: ``latents - sigma * velocity``."""
    if image.velocity is None:
        return None
    return image.latents - image.schedule.sigmas[image.step] * image.velocity
