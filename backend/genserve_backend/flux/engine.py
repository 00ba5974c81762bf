"""The FLUX engine: a batch that images join and leave between steps.

Each tick runs one forward of the transformer for some of the running images and moves each of them along its own
schedule. Images come and go between ticks, whatever their steps, guidance, prompts and sizes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch

from genserve_backend.errors import RequestError
from genserve_backend.flux.admission import Intake, arrange
from genserve_backend.flux.batching import choose
from genserve_backend.flux.decode import Decoder
from genserve_backend.flux.denoise import Denoiser
from genserve_backend.flux.image import Image
from genserve_backend.flux.prompts import Embedding, PromptEncoder
from genserve_backend.flux.report import Reporter
from genserve_backend.flux.schedule import Scheduler
from genserve_backend.logs import log
from genserve_backend.settings import FluxSettings
from genserve_backend.worker.engine import Emit, Inbox, Job
from genserve_backend.worker.isolate import isolate
from genserve_backend.worker.messages import Cancel, Failed, Grant, Submit

OUT_OF_MEMORY_S = 60.0
"""Seconds for which forwards stay below the size of one that did not fit."""

logger = logging.getLogger(__name__)


class FluxEngine:
    """Makes images, many at a time.

    Args:
        encoder: Prompts to embeddings.
        scheduler: Plans steps.
        denoiser: Takes steps.
        decoder: Latents to answers.
        reporter: Progress, previews and counts.
        intake: Decides how many requests to ask for.
        settings: The limits.
        emit: Where events go.
    """

    def __init__(
        self,
        *,
        encoder: PromptEncoder,
        scheduler: Scheduler,
        denoiser: Denoiser,
        decoder: Decoder,
        reporter: Reporter,
        intake: Intake,
        settings: FluxSettings,
        emit: Emit,
    ) -> None:
        self._encoder = encoder
        self._scheduler = scheduler
        self._denoiser = denoiser
        self._decoder = decoder
        self._reporter = reporter
        self._intake = intake
        self._settings = settings
        self._max_padding = settings.padding_limit(denoiser.device.type)
        self._emit = emit
        self._inbox: Inbox[Submit | Cancel] = Inbox()
        self._jobs: WeakValueDictionary[int, Job] = WeakValueDictionary()  # those being decoded among them
        self._images: dict[int, Image] = {}
        self._running: list[Image] = []
        self._waiting: list[Image] = []
        self._tick = 0
        self._looked = time.monotonic()
        self._fits = settings.max_batched_tokens
        """Image tokens that a forward has room for, as far as is known."""
        self._fits_until = 0.0

    def submit(self, submit: Submit) -> None:
        """Take a request."""
        self._inbox.put(submit)

    def cancel(self, job_id: int) -> None:
        """Stop working on a request at the next step. One that is unknown or done is left alone."""
        self._inbox.put(Cancel(job_id))

    def run(self) -> None:
        """Work until the process ends.

        Raises:
            DeviceLost: The device has failed for good.
        """
        while True:
            self.turn()

    @torch.inference_mode()
    def turn(self) -> None:
        """Hear what came, take one step, and say what is to say. Waits for a request where there is nothing to do."""
        self._ask()
        for message in self._inbox.take(wait=not self._images):
            self._take(message)
        self._arrange()
        self._prepare([image for image in self._running if not image.has_started])
        if self._running:
            self._step()
        self._reporter.report(self._running, self._waiting)

    # What a turn is made of.

    def _ask(self) -> None:
        # Images that wait for the decoder have given up their places, but there must be an end to them.
        if self._decoder.pending <= self._settings.max_running:
            count = self._intake.ask(self._running, self._waiting, tick=self._tick)
            if count:
                self._emit(Grant(count))

    def _take(self, message: Submit | Cancel) -> None:
        if isinstance(message, Submit):
            self._intake.came()
            job = self._jobs[message.job] = Job(message, self._emit)
            self._images[message.job] = Image(job, message.request, ran_at=self._tick)
        elif known := self._jobs.get(message.job):
            known.cancelled = True

    def _arrange(self) -> None:
        """Drop who is cancelled or late, and give out the places anew."""
        for image, error in [(image, image.job.end()) for image in self._images.values()]:
            if error:
                self._fail(image, error)
        now = time.monotonic()
        for image in self._waiting:
            image.waited_s += now - self._looked
        self._looked = now
        self._running, self._waiting = arrange(
            self._images.values(),
            max_running=self._settings.max_running,
            max_tokens=self._settings.max_batched_tokens,
        )
        for image in self._waiting:
            if image.has_started and not image.paused:
                self._reporter.paused()
                log(logger, logging.DEBUG, "image paused", task_id=image.job.submit.task_id, step=image.step)
            image.paused = image.has_started
        for image in self._running:
            image.paused = False

    def _prepare(self, newcomers: Sequence[Image]) -> None:
        """Encode the prompts of images that begin to run, all together, and draw their noise."""
        if not newcomers:
            return
        started = time.monotonic()
        found, failed = self._encoder.encode(text for image in newcomers for text in image.texts)
        encoded = time.monotonic()
        self._reporter.encoded(encoded - started)
        for image in newcomers:
            request = image.request
            error = next((failed[text] for text in image.texts if text in failed), None)
            if error is None:
                error = self._begin(image, found)
            if error:
                self._fail(image, error)
                continue
            image.started, image.queue_s = started, started - image.arrived
            image.encode_s, image.denoise_started = encoded - started, encoded
            image.job.progress(0, request.steps)

    def _begin(self, image: Image, embeddings: dict[str, Embedding]) -> RequestError | None:
        def begin(_: Sequence[Image]) -> list[torch.Tensor]:
            image.schedule = self._scheduler.plan(image.request.steps, image.tokens)
            return [self._denoiser.noise(image)]

        made, failed = isolate(begin, [image], name=lambda image: image.name)
        if failed:
            return failed[image]
        image.latents = made[image]
        image.prompt = embeddings[image.request.prompt]
        image.negative = embeddings[image.request.negative_prompt] if image.request.guided else None
        return None

    def _step(self) -> None:
        """Run a forward for those whose turn it is, and hand on the images that are finished with it."""
        if time.monotonic() > self._fits_until:
            self._fits = self._settings.max_batched_tokens
        batch = choose(self._running, tick=self._tick, max_tokens=self._fits, max_padding=self._max_padding)
        self._tick += 1
        made, failed = isolate(self._forward, batch, name=lambda image: image.name)
        for image, error in failed.items():
            self._fail(image, error)
        for image, (latents, velocity) in made.items():
            image.latents, image.velocity = latents, velocity
            image.step += 1
            image.ran_at = self._tick
            if not image.steps_left:
                self._finish(image)

    def _forward(self, images: Sequence[Image]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        started = time.monotonic()
        try:
            made = self._denoiser.step(images)
        except torch.OutOfMemoryError:
            if len(images) > 1:
                self._fits = sum(image.cost for image in images) // 2
                self._fits_until = time.monotonic() + OUT_OF_MEMORY_S
            raise
        for image in images:
            image.batch_sizes += len(images)
        self._reporter.stepped(len(images), time.monotonic() - started)
        return made

    def _finish(self, image: Image) -> None:
        self._forget(image)
        image.denoise_s = time.monotonic() - image.denoise_started
        image.velocity = None
        self._decoder.put(image)

    def _fail(self, image: Image, error: RequestError) -> None:
        self._forget(image)
        self._emit(Failed(image.job.submit.job, error))

    def _forget(self, image: Image) -> None:
        del self._images[image.job.submit.job]
        for images in (self._running, self._waiting):
            if image in images:
                images.remove(image)
