"""The FLUX engine on a simulated device. Only the worker imports this module.

Prompt cache, scheduler, admission, batching, cancellation, priorities, metrics and image files are the product's own.
The parts below replace the checkpoint: an encoder, a denoiser and a decoder that carry a picture's bytes through the
engine. Each part adds its own bytes, so a mix-up anywhere on the way shows in the picture.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from genserve_backend.flux.admission import Intake
from genserve_backend.flux.archive import ImageArchive
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.decode import Decoder, Finished
from genserve_backend.flux.denoise import Denoiser, Stepped
from genserve_backend.flux.engine import FluxEngine
from genserve_backend.flux.lora.adapters import Adapters
from genserve_backend.flux.policy import make_policy
from genserve_backend.flux.policy.costs import MeasuredCosts
from genserve_backend.flux.preview import Previewer
from genserve_backend.flux.prompts import Embedding, Prompt, PromptEncoder
from genserve_backend.flux.report import Reporter
from genserve_backend.flux.request import PIXELS_PER_TOKEN
from genserve_backend.flux.schedule import Scheduler
from genserve_backend.flux.state import ImageState
from genserve_backend.settings import FluxSettings
from genserve_backend.worker.engine import Emit
from simulated import DEVICE_ENV
from simulated.device import Device
from simulated.picture import PICTURE_BYTES, PROMPT_BYTES, STEPS_AT, draw, prompt_bytes, seed_bytes

DEVICE, DTYPE = torch.device("cpu"), torch.float32
POLL_S = 0.0005
"""Interval between two looks at the decoder, in seconds."""


class SimulatedEncoder(PromptEncoder):
    """Text encoders that return the digest of a prompt.

    Args:
        times: The device.
        decoder: Has the device first.
        cache_bytes: Size of the cache.
    """

    def __init__(self, times: Device, decoder: SimulatedDecoder, *, cache_bytes: int) -> None:
        pipeline = SimpleNamespace(transformer=SimpleNamespace(device=DEVICE))
        super().__init__(pipeline, max_sequence_length=0, cache_bytes=cache_bytes)
        self._times = times
        self._decoder = decoder

    def _forward(self, prompts: Sequence[Prompt]) -> list[Embedding]:
        self._decoder.wait()
        _take(self._times.encode_s(len(prompts)))
        texts = (prompt for prompt in prompts if isinstance(prompt, str))  # all of them, without adapters
        return [Embedding(_numbers(prompt_bytes(text)), torch.zeros(1)) for text in texts]


class SimulatedDenoiser(Denoiser):
    """Transformer whose forward takes the time of a table.

    Args:
        times: The device.
        decoder: Has the device first: decodings and steps share it, so that no work is done twice at a time.
    """

    def __init__(self, times: Device, decoder: SimulatedDecoder) -> None:
        # The parent's attributes all belong to its transformer.
        self.device, self.dtype = DEVICE, DTYPE
        self._times = times
        self._decoder = decoder

    def noise(self, image: ImageState) -> torch.Tensor:
        """Return the picture's bytes so far as numbers, ``[PICTURE_BYTES]``: the seed."""
        latents = torch.zeros(PICTURE_BYTES, dtype=DTYPE)
        latents[PROMPT_BYTES:STEPS_AT] = _numbers(seed_bytes(image.request.seed))
        return latents

    def step(self, images: Sequence[ImageState]) -> list[Stepped]:
        """Return new latents and a velocity per image: the prompt is entered, and the step counted."""
        self._decoder.wait()
        rows, longest = sum(image.batch_rows for image in images), max(image.tokens for image in images)
        _take(self._times.step_s(rows, longest))
        return [Stepped(_stepped(image), torch.zeros(PICTURE_BYTES, dtype=DTYPE)) for image in images]


class SimulatedDecoder(Decoder):
    """VAE that turns latents into a picture.

    Args:
        times: The device.
        model: The checkpoint's name.
        archive: Receives a copy of every file.
        costs: Learns from the images how long they take.
    """

    def __init__(self, times: Device, *, model: str, archive: ImageArchive, costs: MeasuredCosts) -> None:
        self._times = times
        pipeline = SimpleNamespace(vae=None, transformer=SimpleNamespace(device=DEVICE))
        dtype = str(DTYPE).removeprefix("torch.")
        super().__init__(pipeline, model=model, dtype=dtype, archive=archive, costs=costs)

    def wait(self) -> None:
        """Wait while there is something to decode."""
        while self._decoding.seconds or not self._queue.empty():
            time.sleep(POLL_S)

    def _pictures(self, images: Sequence[ImageState]) -> list[Image.Image]:
        _take(sum(self._times.decode_s(image.tokens) for image in images))
        return [_picture(image.latents) for image in images]

    def _write(self, finished: Finished, picture: Image.Image) -> None:
        _take(self._times.file_s(finished.image.tokens))
        super()._write(finished, picture)


class SimulatedPreviewer(Previewer):
    """Previews that show the picture so far."""

    def __init__(self) -> None:
        # The parent fits a map to the VAE.
        pass

    def jpeg(self, latents: torch.Tensor, height: int, width: int) -> bytes:
        """Return the unfinished picture as a JPEG of its own size."""
        buffer = io.BytesIO()
        _picture(latents).save(buffer, "JPEG")
        return buffer.getvalue()


def build(settings: FluxSettings, device: str, emit: Emit) -> FluxEngine:
    """Build the engine. The checkpoint in `settings` gives it its name and its limits; no weights are loaded."""
    checkpoint = FluxCheckpoint.load(settings.model_path)
    times = Device.load(os.environ[DEVICE_ENV], compiled=settings.compiled)
    costs = MeasuredCosts(text_tokens=times.text_tokens)
    archive = ImageArchive(settings.save_test_images)
    decoder = SimulatedDecoder(times, model=checkpoint.name, archive=archive, costs=costs)
    adapters = Adapters(None, settings)
    return FluxEngine(
        encoder=SimulatedEncoder(times, decoder, cache_bytes=settings.prompt_cache_bytes),
        scheduler=Scheduler(FlowMatchEulerDiscreteScheduler()),
        denoiser=SimulatedDenoiser(times, decoder),
        decoder=decoder,
        adapters=adapters,
        reporter=Reporter(SimulatedPreviewer(), decoder, adapters, device=DEVICE, emit=emit),
        intake=Intake(
            max_running=settings.max_running,
            max_tokens=settings.max_batched_tokens,
            max_waiting=settings.max_gpu_queue_size,
            usual_cost=checkpoint.native_size**2 // PIXELS_PER_TOKEN,
        ),
        policy=make_policy(settings, times.kind, costs),
        costs=costs,
        settings=settings,
        emit=emit,
    )


def _take(seconds: float) -> None:
    if seconds:
        time.sleep(seconds)


def _numbers(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=DTYPE)


def _stepped(image: ImageState) -> torch.Tensor:
    latents = image.latents.clone()
    latents[:PROMPT_BYTES] = image.prompt.tokens
    latents[STEPS_AT] += 1
    return latents


def _picture(latents: torch.Tensor) -> Image.Image:
    return draw(bytes(latents.to(torch.uint8).tolist()))
