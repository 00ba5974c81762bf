"""Makes one image at a time, with diffusers' own pipeline."""

from __future__ import annotations

import time
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FluxPipeline
from PIL import Image

from genserve_backend.devices import resolve_dtype
from genserve_backend.errors import OutOfMemory, ServerError
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.images import encode, generation_settings
from genserve_backend.flux.request import FluxRequest, FluxResult
from genserve_backend.settings import FluxSettings
from genserve_backend.worker.engine import Job


def build(settings: FluxSettings, device: str) -> FluxHandler:
    """Load the checkpoint onto the device.

    Raises:
        CheckpointError: The folder is missing or incomplete.
    """
    checkpoint = FluxCheckpoint.read(settings.model_path)
    dtype = resolve_dtype(settings.dtype, device)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipeline = FluxPipeline.from_pretrained(checkpoint.path, dtype=dtype, local_files_only=True, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return FluxHandler(pipeline.to(device), checkpoint)


class FluxHandler:
    """A loaded FLUX checkpoint."""

    def __init__(self, pipeline: FluxPipeline, checkpoint: FluxCheckpoint) -> None:
        self._pipeline = pipeline
        self._checkpoint = checkpoint
        self._dtype = str(pipeline.transformer.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def __call__(self, request: FluxRequest, job: Job) -> FluxResult:
        """Encode the prompts, denoise, decode, and encode the image file."""
        queue_s = job.waited_s
        started = time.monotonic()
        job.progress(0, request.steps)
        try:
            embeddings = self._encode_prompts(request)
            encoded = time.monotonic()
            latents = self._denoise(request, embeddings, job)
            denoised = time.monotonic()
            image = self._decode(request, latents)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise OutOfMemory(
                f"an image of {request.height} x {request.width} pixels does not fit into the device's memory"
            ) from None
        settings = generation_settings(request, model=self._checkpoint.name, dtype=self._dtype)
        data = encode(image, request, settings)
        finished = time.monotonic()
        return FluxResult(
            image=data,
            queue_s=queue_s,
            encode_s=encoded - started,
            denoise_s=denoised - encoded,
            decode_s=finished - denoised,
            elapsed_time=queue_s + finished - started,
            mean_batch_size=1.0,
            dtype=self._dtype,
        )

    def _encode_prompts(self, request: FluxRequest) -> dict[str, torch.Tensor]:
        """Embeddings as FluxPipeline takes them: CLIP's pooled ``[1, D]`` and T5's ``[1, tokens, D]``."""

        def encode_prompt(text: str) -> tuple[torch.Tensor, torch.Tensor]:
            embeds, pooled, _ = self._pipeline.encode_prompt(
                prompt=text, prompt_2=None, max_sequence_length=request.max_sequence_length
            )
            return embeds, pooled

        embeds, pooled = encode_prompt(request.prompt)
        embeddings = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        if request.negative_prompt:
            embeds, pooled = encode_prompt(request.negative_prompt)
            embeddings |= {"negative_prompt_embeds": embeds, "negative_pooled_prompt_embeds": pooled}
        return embeddings

    def _denoise(self, request: FluxRequest, embeddings: dict[str, torch.Tensor], job: Job) -> torch.Tensor:
        """Packed latents ``[1, height / 16 * width / 16, 64]``."""

        def after_step(_: FluxPipeline, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            job.check()
            job.progress(step + 1, request.steps)
            return tensors

        latents: torch.Tensor = self._pipeline(
            **embeddings,
            true_cfg_scale=request.true_cfg_scale,
            height=request.height,
            width=request.width,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            # On the CPU whatever the device, so that a seed means the same noise everywhere.
            generator=torch.Generator("cpu").manual_seed(request.seed),
            max_sequence_length=request.max_sequence_length,
            output_type="latent",
            callback_on_step_end=after_step,
        ).images
        if not torch.isfinite(latents).all():
            raise ServerError("the latents are not finite")
        return latents

    def _decode(self, request: FluxRequest, latents: torch.Tensor) -> Image.Image:
        """As FluxPipeline decodes: undo the packing and the VAE's scaling, then decode."""
        pipeline = self._pipeline
        unpacked = pipeline._unpack_latents(latents, request.height, request.width, pipeline.vae_scale_factor)
        config = pipeline.vae.config
        pixels = pipeline.vae.decode(unpacked / config.scaling_factor + config.shift_factor, return_dict=False)[0]
        image: Image.Image = pipeline.image_processor.postprocess(pixels, output_type="pil")[0]
        return image
