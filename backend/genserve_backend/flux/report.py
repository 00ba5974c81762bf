"""What an engine tells about its work: progress and previews for callers, numbers for operators."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from queue import SimpleQueue

import torch

from genserve_backend.devices import memory_bytes, step_aside
from genserve_backend.flux.decode import Decoder
from genserve_backend.flux.image import Image
from genserve_backend.flux.preview import Previewer
from genserve_backend.worker.engine import PROGRESS_S, Emit, Pulse
from genserve_backend.worker.messages import Beat
from genserve_backend.worker.threads import start_thread

STAGES = ("encode_seconds", "denoise_seconds")
MIN_PREVIEW_S, MAX_PREVIEW_S = 0.1, 1.0
"""Seconds between two previews of an image."""
PREVIEW_SHARE = 0.005
"""Share of its thread's time that previews take, between those limits."""

logger = logging.getLogger(__name__)


class Reporter:
    """Collects what happens and passes it on now and then; the engine's thread does next to nothing for it.

    Args:
        previewer: Latents to small pictures.
        decoder: Asked what it does.
        device: Whose memory is reported.
        emit: Where events go.
    """

    def __init__(self, previewer: Previewer, decoder: Decoder, *, device: torch.device, emit: Emit) -> None:
        self._previewer = previewer
        self._decoder = decoder
        self._device = device
        self._pulse = Pulse(emit, self._beat)
        self._counts: Counter[str] = Counter()
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._batch_sizes: list[int] = []
        self._running = self._waiting = 0
        self._previewed = 0.0
        self._preview_s = MIN_PREVIEW_S
        self._previews: SimpleQueue[list[tuple[Image, int, torch.Tensor]]] = SimpleQueue()
        start_thread(self._preview, name="preview")

    def stepped(self, images: int, seconds: float) -> None:
        """A forward for `images` images took `seconds`."""
        self._counts["steps"] += images
        self._seconds["denoise_seconds"] += seconds
        self._batch_sizes.append(images)

    def encoded(self, seconds: float) -> None:
        """Prompts were encoded."""
        self._seconds["encode_seconds"] += seconds

    def paused(self) -> None:
        """An image has lost its place to a more urgent one."""
        self._counts["preemptions"] += 1

    def report(self, running: Sequence[Image], waiting: Sequence[Image]) -> None:
        """Call it after every step."""
        self._running, self._waiting = len(running), len(waiting)
        now = time.monotonic()
        for image in running:
            if image.step and now - image.reported >= PROGRESS_S:
                image.reported = now
                image.job.progress(image.step, image.request.steps)
        if now - self._previewed >= self._preview_s and self._previews.empty():
            self._previewed = now
            # Tensors are replaced, never changed, so the other thread may look at these whenever it gets to them.
            self._previews.put(
                [(image, image.step, estimate) for image in running if (estimate := _estimate(image)) is not None]
            )
        self._pulse.beat()

    def _preview(self) -> None:
        step_aside()
        with torch.inference_mode():
            while True:
                estimates = self._previews.get()
                started = time.monotonic()
                for image, step, estimate in estimates:
                    request = image.request
                    try:
                        jpeg = self._previewer.jpeg(estimate, request.height, request.width)
                    except Exception:
                        logger.exception("no preview", extra={"fields": {"task_id": image.job.submit.task_id}})
                    else:
                        image.job.progress(step, request.steps, jpeg)
                seconds = (time.monotonic() - started) / PREVIEW_SHARE
                self._preview_s = min(max(MIN_PREVIEW_S, seconds), MAX_PREVIEW_S)

    def _beat(self) -> Beat:
        counts = {**self._counts, **self._seconds, "decode_seconds": self._decoder.take_seconds()}
        sizes = tuple(self._batch_sizes)
        self._counts.clear()
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._batch_sizes.clear()
        gauges = {
            "running": self._running,
            "waiting": self._waiting,
            "decoding": self._decoder.pending,
            "device_memory_bytes": memory_bytes(self._device),
        }
        return Beat(gauges, counts, sizes, stalled_s=self._decoder.busy_s())


def _estimate(image: Image) -> torch.Tensor | None:
    """What the image would be if the rest of the way were straight: ``latents - sigma * velocity``."""
    if image.velocity is None:
        return None
    return image.latents - image.schedule.sigmas[image.step] * image.velocity
