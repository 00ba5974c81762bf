"""Construction of the FLUX engine from a checkpoint."""

from __future__ import annotations

import logging

import diffusers
import torch
import transformers
from diffusers import FluxPipeline
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

from genserve_backend.devices import resolve_dtype, use_reproducible_kernels
from genserve_backend.flux import precision
from genserve_backend.flux.admission import Intake
from genserve_backend.flux.archive import ImageArchive
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.compilation import compile_blocks
from genserve_backend.flux.decode import MAX_IMAGES, Decoder
from genserve_backend.flux.denoise import Denoiser
from genserve_backend.flux.engine import FluxEngine
from genserve_backend.flux.lora.adapters import Adapters
from genserve_backend.flux.policy import make_policy
from genserve_backend.flux.policy.costs import MeasuredCosts
from genserve_backend.flux.preview import Previewer
from genserve_backend.flux.prompts import MAX_PROMPTS, PromptEncoder
from genserve_backend.flux.report import Reporter
from genserve_backend.flux.request import PIXELS_PER_TOKEN
from genserve_backend.flux.schedule import Scheduler
from genserve_backend.flux.step_cache import FirstBlockCache, MagCache, NoCache, StepCache
from genserve_backend.logs import log
from genserve_backend.settings import CacheMethod, FluxSettings
from genserve_backend.worker.engine import Emit

logger = logging.getLogger(__name__)


def build(settings: FluxSettings, device: str, emit: Emit) -> FluxEngine:
    """Build the engine for the checkpoint in `settings` on `device` ("cpu", "cuda:0").

    Raises:
        CheckpointError: The folder is missing or incomplete, or the device cannot run the dtype.
    """
    checkpoint = FluxCheckpoint.load(settings.model_path)
    precision.require_support(settings, device)
    return assemble(load_pipeline(checkpoint, settings, device), checkpoint, settings, emit)


def assemble(
    pipeline: FluxPipeline,
    checkpoint: FluxCheckpoint,
    settings: FluxSettings,
    emit: Emit,
    *,
    step_cache: StepCache | None = None,
) -> FluxEngine:
    """Return the engine for a pipeline that is already on its device. The transformer's attention is replaced.

    `step_cache` replaces the method of skipping steps that the settings choose.
    """
    text_length = checkpoint.max_sequence_length
    adapters = Adapters(pipeline, settings)
    costs = MeasuredCosts(text_tokens=text_length)
    denoiser = Denoiser(
        pipeline,
        max_sequence_length=text_length,
        real_rotations=settings.compiled,
        adapters=adapters,
        step_cache=step_cache or choose_step_cache(checkpoint, settings.cache_method),
    )
    if settings.deterministic:
        use_reproducible_kernels(denoiser.device.type)
    scheduler = Scheduler(pipeline.scheduler)
    if settings.compiled:
        compile_blocks(pipeline, denoiser, scheduler, adapters=adapters, checkpoint=checkpoint, settings=settings)
    dtype = precision.dtype_name(settings, denoiser.dtype)
    decoder = Decoder(
        pipeline,
        model=checkpoint.name,
        dtype=dtype,
        archive=ImageArchive(settings.save_test_images),
        costs=costs,
        max_images=1 if settings.deterministic else MAX_IMAGES,
    )
    log(logger, logging.INFO, "flux loaded", model=checkpoint.name, device=denoiser.device, dtype=dtype)
    return FluxEngine(
        encoder=PromptEncoder(
            pipeline,
            max_sequence_length=text_length,
            cache_bytes=settings.prompt_cache_bytes,
            max_prompts=1 if settings.deterministic else MAX_PROMPTS,
            adapters=adapters,
        ),
        scheduler=scheduler,
        denoiser=denoiser,
        decoder=decoder,
        adapters=adapters,
        reporter=Reporter(Previewer(pipeline), decoder, adapters, device=denoiser.device, emit=emit),
        intake=Intake(
            max_running=settings.max_running,
            max_tokens=settings.max_batched_tokens,
            max_waiting=settings.max_gpu_queue_size,
            usual_cost=checkpoint.native_size**2 // PIXELS_PER_TOKEN,
        ),
        policy=make_policy(settings, denoiser.device.type, costs),
        costs=costs,
        settings=settings,
        emit=emit,
    )


def choose_step_cache(checkpoint: FluxCheckpoint, method: CacheMethod) -> StepCache:
    """Return the method of skipping steps for requests with CACHE."""
    if method == "first-block":
        return FirstBlockCache()
    if not checkpoint.has_mag_ratios:
        return NoCache()  # such requests are rejected
    return MagCache(checkpoint.mag_ratios or FLUX_MAG_RATIOS.tolist())


def load_pipeline(checkpoint: FluxCheckpoint, settings: FluxSettings, device: str) -> FluxPipeline:
    """Load the weights of a checkpoint, and place them as the settings say."""
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()  # it would log truncated prompts
    transformers.utils.logging.disable_progress_bar()
    dtype = resolve_dtype(settings.dtype, device)
    pipeline = FluxPipeline.from_pretrained(
        checkpoint.path,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        # Straight from the files, without a copy in host memory, unless the GPU may have no room for all of them.
        device_map=None if precision.starts_on_host(settings, device) else torch.device(device).type,
    )
    pipeline.vae.to(memory_format=torch.channels_last)  # the demo's decoder then takes 2/3 of the time
    precision.place(pipeline, settings, device)
    return pipeline
