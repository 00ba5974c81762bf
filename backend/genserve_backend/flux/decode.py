"""Finished latents to image files, in threads of their own: the next step never waits for them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue

import torch
from diffusers import FluxPipeline
from PIL import Image as PilImage

from genserve_backend.devices import finish, hand_over, mark, own_stream, step_aside
from genserve_backend.errors import RequestError, ServerError
from genserve_backend.flux.image import Image
from genserve_backend.flux.images import encode, generation_settings
from genserve_backend.flux.keep import Keeper
from genserve_backend.flux.request import FluxResult
from genserve_backend.worker.engine import defect
from genserve_backend.worker.isolate import isolate
from genserve_backend.worker.messages import Done, Event, Failed
from genserve_backend.worker.threads import Busy, start_thread

MAX_IMAGES = 4
MAX_PIXELS = 1024 * 1024
"""Pixels of one VAE forward, at most (one image alone may exceed it): its activations are large, and it gains little
from batches."""
WRITERS = 2
"""Threads that compress images; Pillow works without Python's lock."""

logger = logging.getLogger(__name__)


@dataclass
class Finished:
    """Latents on their way to a file."""

    image: Image
    ready: torch.cuda.Event | None
    """On a GPU: the engine's stream has got to the end of its last step."""
    at: float = field(default_factory=time.monotonic)


class Decoder:
    """Takes images that have done their last step, and answers them.

    Args:
        pipeline: Has the VAE.
        model: The checkpoint's name, for the metadata.
        keeper: Keeps a copy of the files, where the operator wants that.
        emit: Where the answers go.
    """

    def __init__(self, pipeline: FluxPipeline, *, model: str, keeper: Keeper, emit: Callable[[Event], None]) -> None:
        self._pipeline = pipeline
        self._vae = pipeline.vae
        self._model = model
        self._dtype = str(pipeline.transformer.dtype).removeprefix("torch.")
        self._keeper = keeper
        self._emit = emit
        self._queue: SimpleQueue[Finished] = SimpleQueue()
        self._lock = threading.Lock()
        self._pending = 0
        self._seconds = 0.0
        self._decoding = Busy()
        self._writing = [Busy() for _ in range(WRITERS)]
        self._pictures_done: SimpleQueue[tuple[Finished, PilImage.Image]] = SimpleQueue()
        start_thread(self._run, name="decode")
        for number, busy in enumerate(self._writing):
            start_thread(partial(self._write_all, busy), name=f"write-{number}")

    def put(self, image: Image) -> None:
        """Take an image, whose last step the caller's stream may still be at; it is answered in any case."""
        with self._lock:
            self._pending += 1
        self._queue.put(Finished(image, mark(self._vae.device)))

    @property
    def pending(self) -> int:
        """Images that were taken and are not answered."""
        return self._pending

    def busy_s(self) -> float:
        """Return for how many seconds one of the threads has been at one forward or file; 0 where all are idle."""
        return max(busy.seconds for busy in (self._decoding, *self._writing))

    def take_seconds(self) -> float:
        """Seconds spent in decoding and encoding since the last call."""
        with self._lock:
            seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _run(self) -> None:
        step_aside()
        with torch.inference_mode(), own_stream(self._vae.device):  # beside the next step
            held: Finished | None = None
            while True:
                batch = [held or self._queue.get()]
                held = self._fill(batch)
                with self._decoding:
                    self._decode(batch)

    def _fill(self, batch: list[Finished]) -> Finished | None:
        """Add what waits and has the same size; return the first one that does not, or does not fit any more."""
        request = batch[0].image.request
        limit = max(1, min(MAX_IMAGES, MAX_PIXELS // (request.height * request.width)))
        while len(batch) < limit and not self._queue.empty():
            other = self._queue.get()
            if (other.image.request.height, other.image.request.width) != (request.height, request.width):
                return other
            batch.append(other)
        return None

    def _decode(self, batch: list[Finished]) -> None:
        started = time.monotonic()
        alive: dict[Image, Finished] = {}
        for finished in batch:
            if error := finished.image.job.end():
                self._fail(finished.image, error)
            else:
                hand_over(finished.image.latents, finished.ready)
                alive[finished.image] = finished
        for image in _not_finite(list(alive)):
            self._fail(image, ServerError("the latents are not finite"))
            del alive[image]
        pictures: dict[Image, PilImage.Image] = {}
        if alive:
            pictures, failed = isolate(self._pictures, list(alive), name=lambda image: image.name)
            for image, error in failed.items():
                self._fail(image, error)
        with self._lock:
            self._seconds += time.monotonic() - started
        for image, picture in pictures.items():
            self._pictures_done.put((alive[image], picture))

    def _pictures(self, images: Sequence[Image]) -> list[PilImage.Image]:
        """As FluxPipeline decodes: undo the packing and the VAE's scaling, then decode."""
        pipeline, request = self._pipeline, images[0].request
        packed = torch.stack([image.latents for image in images])
        latents = pipeline._unpack_latents(packed, request.height, request.width, pipeline.vae_scale_factor)
        config = self._vae.config
        pixels = self._vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
        finish(pixels.device)
        pictures: list[PilImage.Image] = pipeline.image_processor.postprocess(pixels, output_type="pil")
        return pictures

    def _write_all(self, busy: Busy) -> None:
        while True:
            finished, picture = self._pictures_done.get()
            with busy:
                self._write(finished, picture)

    def _write(self, finished: Finished, picture: PilImage.Image) -> None:
        image, started = finished.image, time.monotonic()
        request, submit = image.request, image.job.submit
        try:
            data = encode(picture, request, generation_settings(request, model=self._model, dtype=self._dtype))
            self._keeper.keep(submit.task_id, data, request.format)
        except Exception as error:
            logger.exception("image not encoded", extra={"fields": {"task_id": submit.task_id}})
            self._fail(image, defect(error))
            return
        now = time.monotonic()
        with self._lock:
            self._pending -= 1
            self._seconds += now - started
        self._emit(
            Done(
                submit.job,
                FluxResult(
                    image=data,
                    queue_s=image.queue_s,
                    encode_s=image.encode_s,
                    denoise_s=image.denoise_s,
                    decode_s=now - finished.at,
                    elapsed_time=now - image.arrived,
                    mean_batch_size=image.batch_sizes / request.steps,
                    dtype=self._dtype,
                ),
            )
        )

    def _fail(self, image: Image, error: RequestError) -> None:
        with self._lock:
            self._pending -= 1
        self._emit(Failed(image.job.submit.job, error))


def _not_finite(images: Sequence[Image]) -> list[Image]:
    """Return the images whose latents hold what is no number."""
    if not images:
        return []
    finite = torch.stack([torch.isfinite(image.latents).all() for image in images])
    finish(finite.device)
    return [image for image, good in zip(images, finite.tolist(), strict=True) if not good]
