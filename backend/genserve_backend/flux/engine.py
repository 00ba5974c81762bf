"""The FLUX engine: a batch that images join and leave between steps.

Each tick runs one transformer forward for some of the running images and moves each of them along its own schedule.
Images join and leave between ticks, whatever their steps, guidance, prompts and sizes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch

from genserve_backend.devices import Stopwatch
from genserve_backend.errors import DeadlineExceeded, RequestError
from genserve_backend.flux.admission import Intake
from genserve_backend.flux.decode import Decoder
from genserve_backend.flux.denoise import Denoiser, Stepped
from genserve_backend.flux.lora.adapters import Adapters
from genserve_backend.flux.lora.cache import Combination
from genserve_backend.flux.policy.base import Policy
from genserve_backend.flux.policy.costs import MeasuredCosts
from genserve_backend.flux.prompts import Embedding, Prompt, PromptEncoder
from genserve_backend.flux.report import Reporter
from genserve_backend.flux.schedule import Scheduler
from genserve_backend.flux.state import ImageState
from genserve_backend.logs import log
from genserve_backend.settings import FluxSettings
from genserve_backend.worker.engine import Emit, Inbox, Job
from genserve_backend.worker.isolate import isolate
from genserve_backend.worker.messages import Cancel, Grant, Submit

OUT_OF_MEMORY_S = 60.0
"""Seconds for which forwards stay below the size of one that ran out of memory."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """Message: the adapters of an image are in host memory, or cannot be used."""

    job_id: int
    adapters: Combination | RequestError


class FluxEngine:
    """Text-to-image engine that denoises many images at a time.

    Args:
        encoder: Encodes prompts.
        scheduler: Plans the steps of an image.
        denoiser: Runs the steps.
        decoder: Turns final latents into answers.
        adapters: Loads the adapters of requests.
        reporter: Reports progress, previews and metrics.
        intake: Decides how many requests to grant.
        policy: Decides which images run.
        costs: Learns from the forwards how long they take.
        settings: The limits.
        emit: Receives the events.
    """

    def __init__(
        self,
        *,
        encoder: PromptEncoder,
        scheduler: Scheduler,
        denoiser: Denoiser,
        decoder: Decoder,
        adapters: Adapters,
        reporter: Reporter,
        intake: Intake,
        policy: Policy,
        costs: MeasuredCosts,
        settings: FluxSettings,
        emit: Emit,
    ) -> None:
        self._encoder = encoder
        self._scheduler = scheduler
        self._denoiser = denoiser
        self._decoder = decoder
        self._adapters = adapters
        self._reporter = reporter
        self._intake = intake
        self._policy = policy
        self._costs = costs
        self._forwards: Stopwatch[tuple[int, int]] = Stopwatch(denoiser.device)
        """Times of forwards by batch rows and image tokens per row."""
        self._settings = settings
        self._emit = emit
        self._inbox: Inbox[ImageState | Cancel | Loaded] = Inbox()
        self._jobs: WeakValueDictionary[int, Job] = WeakValueDictionary()  # includes the images that are being decoded
        self._images: dict[int, ImageState] = {}
        self._loading: dict[int, ImageState] = {}
        """Images whose adapters are not loaded yet. Nobody waits for them."""
        self._running: list[ImageState] = []
        self._waiting: list[ImageState] = []
        self._tick = 0
        self._admitted_at = time.monotonic()
        self._max_tokens = settings.max_batched_tokens
        """Current limit on the image tokens of a forward; lower for a while after an out-of-memory error."""
        self._max_tokens_until = 0.0

    def submit(self, submit: Submit) -> None:
        """Accept a request."""
        self._inbox.put(ImageState(Job(submit, self._emit), submit.request))

    def cancel(self, job_id: int) -> None:
        """Stop working on a request at the next step. Ignore one that is unknown or done."""
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
        """Receive messages, run one forward and report. Wait for a message if there is no work."""
        self._grant()
        self._receive(wait=not self._images)
        self._drop_stopped()
        self._learn()
        self._refuse()
        self._admit()
        self._begin([image for image in self._running if not image.has_started])
        if self._running:
            self._step()
        self._reporter.report(self._running, self._waiting)

    # The parts of a turn.

    def _grant(self) -> None:
        """Ask for as many requests as there is room for."""
        # Images that wait for the decoder hold no slot, but their number has to be bounded.
        if self._decoder.pending <= self._settings.max_running:
            waiting = [*self._waiting, *self._loading.values()]
            count = self._intake.grant(self._running, waiting, tick=self._tick)
            if count:
                self._emit(Grant(count))

    def _receive(self, *, wait: bool) -> None:
        for message in self._inbox.receive(wait=wait):
            if isinstance(message, ImageState):
                self._intake.arrived()
                message.ran_at = self._tick
                self._jobs[message.job.id] = message.job
                if message.request.lora:
                    self._load(message)
                else:
                    self._images[message.job.id] = message
            elif isinstance(message, Loaded):
                self._loaded(message)
            elif job := self._jobs.get(message.job_id):
                job.cancel()

    def _load(self, image: ImageState) -> None:
        """Load the adapters of a request in another thread. Until then it takes no part in anything."""
        self._loading[image.job.id] = image
        inbox, job_id = self._inbox, image.job.id
        self._adapters.load(image.request.lora, lambda adapters: inbox.put(Loaded(job_id, adapters)))

    def _loaded(self, message: Loaded) -> None:
        image = self._loading.pop(message.job_id, None)
        if image is None:  # it was cancelled meanwhile
            return
        self._images[message.job_id] = image
        if isinstance(message.adapters, RequestError):
            self._fail(image, message.adapters)
        else:
            image.adapters = message.adapters

    def _drop_stopped(self) -> None:
        """Fail cancelled and late requests."""
        for image in [*self._images.values(), *self._loading.values()]:
            if error := image.job.stop_reason():
                self._fail(image, error)
                if isinstance(error, DeadlineExceeded):
                    self._reporter.expired()

    def _learn(self) -> None:
        """Record the forwards that are done by now; nothing waits for the device."""
        for (batch_rows, tokens), seconds in self._forwards.read():
            self._costs.observe_step(batch_rows, tokens, seconds)

    def _refuse(self) -> None:
        """Fail images that could not be finished by their deadline, before any work on them."""
        now = time.monotonic()
        # It is not known how many steps an image with CACHE skips.
        fresh = [image for image in self._images.values() if not (image.has_started or image.request.cache)]
        for image, seconds in self._policy.refused(fresh, now).items():
            left = max(0.0, image.deadline - now)
            message = f"the request takes about {seconds:.1f} s on an idle device, and only {left:.1f} s are left"
            self._fail(image, DeadlineExceeded(message))
            self._reporter.refused()

    def _admit(self) -> None:
        """Reassign the slots."""
        now = time.monotonic()
        for image in self._waiting:
            image.waited_s += now - self._admitted_at
        self._admitted_at = now
        self._running, self._waiting = self._policy.assign(self._images.values(), now)
        for image in self._waiting:
            if image.has_started and not image.preempted:
                self._reporter.preempted()
                log(logger, logging.DEBUG, "image preempted", task_id=image.job.task_id, step=image.step)
            image.preempted = image.has_started
        for image in self._running:
            image.preempted = False

    def _begin(self, newcomers: Sequence[ImageState]) -> None:
        """Encode the prompts of images that got their first slot, all together, and draw their noise."""
        if not newcomers:
            return
        started = time.monotonic()
        newcomers = [image for image in newcomers if self._place_adapters(image)]
        embeddings, failed = self._encoder.encode(prompt for image in newcomers for prompt in image.prompts)
        encoded = time.monotonic()
        self._reporter.encoded(encoded - started)
        self._costs.observe_encode(encoded - started)
        for image in newcomers:
            error = next((failed[prompt] for prompt in image.prompts if prompt in failed), None)
            if error is None:
                error = self._initialize(image, embeddings)
            if error:
                self._fail(image, error)
                continue
            image.started, image.queue_s = started, started - image.arrived
            image.encode_s, image.denoise_started = encoded - started, encoded
            image.job.progress(0, image.request.steps)

    def _place_adapters(self, image: ImageState) -> bool:
        """Copy the adapters of an image to the device; fail the image if that fails."""
        error = self._adapters.place(image.adapters) if image.adapters else None
        if error:
            self._fail(image, error)
        return error is None

    def _initialize(self, image: ImageState, embeddings: dict[Prompt, Embedding]) -> RequestError | None:
        """Plan the steps of an image and set its first latents; return the error if that fails."""

        def noise(_: Sequence[ImageState]) -> list[torch.Tensor]:
            image.schedule = self._scheduler.plan(image.request.steps, image.tokens)
            return [self._denoiser.noise(image)]

        latents, failed = isolate(noise, [image], name=lambda image: image.name)
        if failed:
            return failed[image]
        image.latents = latents[image]
        prompts = image.prompts
        image.prompt = embeddings[prompts[0]]
        image.negative = embeddings[prompts[1]] if image.request.guided else None
        return None

    def _step(self) -> None:
        """Run one forward for the images whose turn it is, and pass on those that are finished."""
        now = time.monotonic()
        if now > self._max_tokens_until:
            self._max_tokens = self._settings.max_batched_tokens
        # No batch holds more than `max_tokens`, but for one that is a single image.
        max_tokens = 0 if self._settings.deterministic else self._max_tokens
        batch = self._policy.choose(self._running, self._waiting, tick=self._tick, now=now, max_tokens=max_tokens)
        self._tick += 1
        outputs, failed = isolate(self._forward, batch, name=lambda image: image.name)
        for image, error in failed.items():
            self._fail(image, error)
        for image, stepped in outputs.items():
            image.latents, image.velocity = stepped.latents, stepped.velocity
            image.residuals = stepped.residuals
            image.skipped_steps += stepped.skipped
            image.step += 1
            image.ran_at = self._tick
            if not image.steps_left:
                self._finish(image)

    def _forward(self, images: Sequence[ImageState]) -> list[Stepped]:
        started = time.monotonic()
        shape = sum(image.batch_rows for image in images), max(image.tokens for image in images)
        try:
            with self._forwards.measure(shape) as lap:
                outputs = self._denoiser.step(images)
        except torch.OutOfMemoryError:
            self._adapters.release()
            if len(images) > 1:
                self._max_tokens = sum(image.cost for image in images) // 2
                self._max_tokens_until = time.monotonic() + OUT_OF_MEMORY_S
            raise
        for image in images:
            image.batch_sizes += len(images)
        skipped = sum(stepped.skipped for stepped in outputs)
        if skipped:
            lap.discard()
        self._reporter.stepped(len(images), time.monotonic() - started, skipped=skipped)
        return outputs

    def _finish(self, image: ImageState) -> None:
        """Pass a denoised image on to the decoder, which answers it."""
        self._forget(image)
        image.denoise_s = time.monotonic() - image.denoise_started
        image.velocity = None
        self._decoder.put(image)

    def _fail(self, image: ImageState, error: RequestError) -> None:
        """Answer a request with an error."""
        self._forget(image)
        image.job.fail(error)

    def _forget(self, image: ImageState) -> None:
        self._images.pop(image.job.id, None)
        self._loading.pop(image.job.id, None)
        image.residuals = ()  # the denoiser's batch refers to the image until the next step
        image.adapters = None
        self._adapters.trim()
        for images in (self._running, self._waiting):
            if image in images:
                images.remove(image)
