"""Construction of the FLUX engine from a checkpoint."""

from __future__ import annotations

import logging

import diffusers
import torch
import transformers
from diffusers import FluxPipeline

from genserve_backend.devices import resolve_dtype, use_reproducible_kernels
from genserve_backend.flux.admission import Intake
from genserve_backend.flux.archive import ImageArchive
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.compilation import compile_blocks
from genserve_backend.flux.decode import MAX_IMAGES, Decoder
from genserve_backend.flux.denoise import Denoiser
from genserve_backend.flux.engine import FluxEngine
from genserve_backend.flux.preview import Previewer
from genserve_backend.flux.prompts import MAX_PROMPTS, PromptEncoder
from genserve_backend.flux.report import Reporter
from genserve_backend.flux.request import PIXELS_PER_TOKEN
from genserve_backend.flux.schedule import Scheduler
from genserve_backend.logs import log
from genserve_backend.matrices import use_packed_matrices
from genserve_backend.settings import FluxSettings
from genserve_backend.worker.engine import Emit

logger = logging.getLogger(__name__)


def build(settings: FluxSettings, device: str, emit: Emit) -> FluxEngine:
    """Build the engine for the checkpoint in `settings` on `device` ("cpu", "cuda:0").

    Raises:
        CheckpointError: The folder is missing or incomplete.
    """
    checkpoint = FluxCheckpoint.load(settings.model_path)
    return assemble(load_pipeline(checkpoint, settings, device), checkpoint, settings, emit)


def assemble(pipeline: FluxPipeline, checkpoint: FluxCheckpoint, settings: FluxSettings, emit: Emit) -> FluxEngine:
    """Return the engine for a pipeline that is already on its device. The transformer's attention is replaced."""
    text_length = checkpoint.max_sequence_length
    denoiser = Denoiser(pipeline, max_sequence_length=text_length, real_rotations=settings.compiled)
    if settings.deterministic:
        use_reproducible_kernels(denoiser.device.type)
    scheduler = Scheduler(pipeline.scheduler)
    if settings.compiled:
        compile_blocks(pipeline, denoiser, scheduler, checkpoint=checkpoint, settings=settings)
    at_once = 1 if settings.deterministic else MAX_IMAGES
    archive = ImageArchive(settings.save_test_images)
    decoder = Decoder(pipeline, model=checkpoint.name, archive=archive, max_images=at_once)
    log(logger, logging.INFO, "flux loaded", model=checkpoint.name, device=denoiser.device, dtype=denoiser.dtype)
    return FluxEngine(
        encoder=PromptEncoder(
            pipeline,
            max_sequence_length=text_length,
            cache_bytes=settings.prompt_cache_bytes,
            max_prompts=1 if settings.deterministic else MAX_PROMPTS,
        ),
        scheduler=scheduler,
        denoiser=denoiser,
        decoder=decoder,
        reporter=Reporter(Previewer(pipeline), decoder, device=denoiser.device, emit=emit),
        intake=Intake(
            max_running=settings.max_running,
            max_tokens=settings.max_batched_tokens,
            max_waiting=settings.max_gpu_queue_size,
            usual_cost=checkpoint.native_size**2 // PIXELS_PER_TOKEN,
        ),
        settings=settings,
        emit=emit,
    )


def load_pipeline(checkpoint: FluxCheckpoint, settings: FluxSettings, device: str) -> FluxPipeline:
    """Load the weights of a checkpoint onto the device."""
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()  # it would log truncated prompts
    transformers.utils.logging.disable_progress_bar()
    dtype = resolve_dtype(settings.dtype, device)
    pipeline = FluxPipeline.from_pretrained(
        checkpoint.path,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        device_map=torch.device(device).type,  # straight from the files, without a copy in host memory
    )
    pipeline.vae.to(memory_format=torch.channels_last)  # the demo's decoder then takes 2/3 of the time
    pipeline.to(device)
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae):
        use_packed_matrices(part)
    return pipeline
