"""Decoding of final latents to image files, in threads alongside the engine's: no step waits for them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue

import torch
from diffusers import FluxPipeline
from PIL import Image

from genserve_backend.devices import hand_over, limit_threads, own_stream, record_event, wait_for_stream
from genserve_backend.errors import RequestError, ServerError
from genserve_backend.flux.archive import ImageArchive
from genserve_backend.flux.image_file import encode, generation_settings
from genserve_backend.flux.policy.costs import MeasuredCosts
from genserve_backend.flux.request import FluxResult
from genserve_backend.flux.state import ImageState
from genserve_backend.worker.engine import defect
from genserve_backend.worker.isolate import isolate
from genserve_backend.worker.threads import Busy, start_thread

MAX_IMAGES = 4
MAX_PIXELS = 1024 * 1024
"""Limit on the pixels of one VAE forward; a single image may exceed it. The activations are large and batching gains
little."""
WRITERS = 2
"""Threads that compress images; Pillow releases the GIL."""

logger = logging.getLogger(__name__)


@dataclass
class Finished:
    """An image whose last step has been queued."""

    image: ImageState
    ready: torch.cuda.Event | None
    """On a GPU, the end of the last step in the engine's stream."""
    at: float = field(default_factory=time.monotonic)


class Decoder:
    """Threads that decode images after their last step, and answer their requests.

    Args:
        pipeline: The pipeline with the VAE.
        model: The checkpoint's name, for the metadata.
        dtype: The dtype, for the metadata.
        archive: Receives a copy of every file.
        costs: Learns from the images how long they take.
        max_images: Images of one VAE forward.
    """

    def __init__(
        self,
        pipeline: FluxPipeline,
        *,
        model: str,
        dtype: str,
        archive: ImageArchive,
        costs: MeasuredCosts,
        max_images: int = MAX_IMAGES,
    ) -> None:
        self._pipeline = pipeline
        self._vae = pipeline.vae
        self._model = model
        self._dtype = dtype
        # The VAE's weights may be in host memory between two decodings.
        self._device: torch.device = pipeline.transformer.device
        self._archive = archive
        self._costs = costs
        self._max_images = max_images
        self._queue: SimpleQueue[Finished] = SimpleQueue()
        self._lock = threading.Lock()
        self._pending = 0
        self._seconds = 0.0
        self._decoding = Busy()
        self._writing = [Busy() for _ in range(WRITERS)]
        self._pictures_done: SimpleQueue[tuple[Finished, Image.Image]] = SimpleQueue()
        start_thread(self._run, name="decode")
        for number, busy in enumerate(self._writing):
            start_thread(partial(self._write_all, busy), name=f"write-{number}")

    def put(self, image: ImageState) -> None:
        """Queue an image. Its last step may still be running in the caller's stream."""
        with self._lock:
            self._pending += 1
        self._queue.put(Finished(image, record_event(self._device)))

    @property
    def pending(self) -> int:
        """Images that were queued and not yet answered."""
        return self._pending

    def busy_s(self) -> float:
        """Return the longest time that a thread has spent on its current forward or file; 0 if all are idle."""
        return max(busy.seconds for busy in (self._decoding, *self._writing))

    def pop_seconds(self) -> float:
        """Return the seconds spent on decoding and encoding since the last call."""
        with self._lock:
            seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _run(self) -> None:
        limit_threads()
        with torch.inference_mode(), own_stream(self._device):  # alongside the next step
            held: Finished | None = None
            while True:
                batch = [held or self._queue.get()]
                held = self._fill(batch)
                with self._decoding:
                    self._decode(batch)

    def _fill(self, batch: list[Finished]) -> Finished | None:
        """Add queued images of the same size, up to the limit; return the first image of another size."""
        request = batch[0].image.request
        limit = max(1, min(self._max_images, MAX_PIXELS // (request.height * request.width)))
        while len(batch) < limit and not self._queue.empty():
            other = self._queue.get()
            if (other.image.request.height, other.image.request.width) != (request.height, request.width):
                return other
            batch.append(other)
        return None

    def _decode(self, batch: list[Finished]) -> None:
        started = time.monotonic()
        alive: dict[ImageState, Finished] = {}
        for finished in batch:
            if error := finished.image.job.stop_reason():
                self._fail(finished.image, error)
            else:
                hand_over(finished.image.latents, finished.ready)
                alive[finished.image] = finished
        for image in _not_finite(list(alive)):
            self._fail(image, ServerError("the latents are not finite"))
            del alive[image]
        pictures: dict[ImageState, Image.Image] = {}
        if alive:
            pictures, failed = isolate(self._pictures, list(alive), name=lambda image: image.name)
            for image, error in failed.items():
                self._fail(image, error)
        with self._lock:
            self._seconds += time.monotonic() - started
        for image, picture in pictures.items():
            self._pictures_done.put((alive[image], picture))

    def _pictures(self, images: Sequence[ImageState]) -> list[Image.Image]:
        """Decode like FluxPipeline: undo the packing and the VAE's scaling, then run the decoder."""
        pipeline, request = self._pipeline, images[0].request
        packed = torch.stack([image.latents for image in images])
        latents = pipeline._unpack_latents(packed, request.height, request.width, pipeline.vae_scale_factor)
        config = self._vae.config
        pixels = self._vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
        wait_for_stream(pixels.device)
        pictures: list[Image.Image] = pipeline.image_processor.postprocess(pixels, output_type="pil")
        return pictures

    def _write_all(self, busy: Busy) -> None:
        while True:
            finished, picture = self._pictures_done.get()
            with busy:
                self._write(finished, picture)

    def _write(self, finished: Finished, picture: Image.Image) -> None:
        image, started = finished.image, time.monotonic()
        request, task_id = image.request, image.job.task_id
        try:
            data = encode(picture, request, generation_settings(request, model=self._model, dtype=self._dtype))
            self._archive.save(task_id, data, request.format)
        except Exception as error:
            logger.exception("image not encoded", extra={"fields": {"task_id": task_id}})
            self._fail(image, defect(error))
            return
        now = time.monotonic()
        with self._lock:
            self._pending -= 1
            self._seconds += now - started
        self._costs.observe_decode(image.tokens, now - finished.at)
        image.job.done(
            FluxResult(
                image=data,
                queue_s=image.queue_s,
                encode_s=image.encode_s,
                denoise_s=image.denoise_s,
                decode_s=now - finished.at,
                elapsed_time=now - image.arrived,
                deadline_left_s=image.deadline - now,
                mean_batch_size=image.batch_sizes / request.steps,
                skipped_steps=image.skipped_steps,
                dtype=self._dtype,
            )
        )

    def _fail(self, image: ImageState, error: RequestError) -> None:
        with self._lock:
            self._pending -= 1
        image.job.fail(error)


def _not_finite(images: Sequence[ImageState]) -> list[ImageState]:
    """Return the images whose latents contain NaN or infinity."""
    if not images:
        return []
    finite = torch.stack([torch.isfinite(image.latents).all() for image in images])
    wait_for_stream(finite.device)
    return [image for image, good in zip(images, finite.tolist(), strict=True) if not good]
