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
from genserve_backend.flux.decode import Decoder
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
from simulated import STEP_ENV
from simulated.picture import PICTURE_BYTES, PROMPT_BYTES, STEPS_AT, draw, prompt_bytes, seed_bytes

DEVICE, DTYPE = torch.device("cpu"), torch.float32


class SimulatedEncoder(PromptEncoder):
    """Text encoders that return the digest of a prompt."""

    def __init__(self, *, cache_bytes: int) -> None:
        pipeline = SimpleNamespace(transformer=SimpleNamespace(device=DEVICE))
        super().__init__(pipeline, max_sequence_length=0, cache_bytes=cache_bytes)

    def _forward(self, prompts: Sequence[Prompt]) -> list[Embedding]:
        texts = (prompt for prompt in prompts if isinstance(prompt, str))  # all of them, without adapters
        return [Embedding(_numbers(prompt_bytes(text)), torch.zeros(1)) for text in texts]


class SimulatedDenoiser(Denoiser):
    """Transformer whose forward takes a fixed time per batch row.

    Args:
        step_s: Seconds per batch row.
    """

    def __init__(self, step_s: float) -> None:
        # The parent's attributes all belong to its transformer.
        self.device, self.dtype = DEVICE, DTYPE
        self._step_s = step_s

    def noise(self, image: ImageState) -> torch.Tensor:
        """Return the picture's bytes so far as numbers, ``[PICTURE_BYTES]``: the seed."""
        latents = torch.zeros(PICTURE_BYTES, dtype=DTYPE)
        latents[PROMPT_BYTES:STEPS_AT] = _numbers(seed_bytes(image.request.seed))
        return latents

    def step(self, images: Sequence[ImageState]) -> list[Stepped]:
        """Return new latents and a velocity per image: the prompt is entered, and the step counted."""
        time.sleep(self._step_s * sum(image.batch_rows for image in images))
        return [Stepped(_stepped(image), torch.zeros(PICTURE_BYTES, dtype=DTYPE)) for image in images]


class SimulatedDecoder(Decoder):
    """VAE that turns latents into a picture."""

    def __init__(self, *, model: str, archive: ImageArchive) -> None:
        pipeline = SimpleNamespace(vae=None, transformer=SimpleNamespace(device=DEVICE))
        super().__init__(pipeline, model=model, dtype=str(DTYPE).removeprefix("torch."), archive=archive)

    def _pictures(self, images: Sequence[ImageState]) -> list[Image.Image]:
        return [_picture(image.latents) for image in images]


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
    decoder = SimulatedDecoder(model=checkpoint.name, archive=ImageArchive(settings.save_test_images))
    adapters = Adapters(None, settings)
    return FluxEngine(
        encoder=SimulatedEncoder(cache_bytes=settings.prompt_cache_bytes),
        scheduler=Scheduler(FlowMatchEulerDiscreteScheduler()),
        denoiser=SimulatedDenoiser(float(os.environ[STEP_ENV])),
        decoder=decoder,
        adapters=adapters,
        reporter=Reporter(SimulatedPreviewer(), decoder, adapters, device=DEVICE, emit=emit),
        intake=Intake(
            max_running=settings.max_running,
            max_tokens=settings.max_batched_tokens,
            max_waiting=settings.max_gpu_queue_size,
            usual_cost=checkpoint.native_size**2 // PIXELS_PER_TOKEN,
        ),
        policy=make_policy(settings, DEVICE.type, MeasuredCosts()),
        settings=settings,
        emit=emit,
    )


def _numbers(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=DTYPE)


def _stepped(image: ImageState) -> torch.Tensor:
    latents = image.latents.clone()
    latents[:PROMPT_BYTES] = image.prompt.tokens
    latents[STEPS_AT] += 1
    return latents


def _picture(latents: torch.Tensor) -> Image.Image:
    return draw(bytes(latents.to(torch.uint8).tolist()))
