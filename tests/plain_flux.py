"""Reference images by plain diffusers."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import FluxPipeline
from pictures import Pixels

from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.request import FluxRequest


def load_plain(checkpoint: FluxCheckpoint, dtype: torch.dtype) -> FluxPipeline:
    """Return the checkpoint's pipeline on the CPU."""
    pipeline = FluxPipeline.from_pretrained(checkpoint.path, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reference(plain: FluxPipeline, request: FluxRequest) -> Pixels:
    """Return the pixels that a pipeline makes for a request. Adapters and caches are those that it has."""
    image = plain(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt or None,
        true_cfg_scale=request.true_cfg_scale,
        height=request.height,
        width=request.width,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        max_sequence_length=request.max_sequence_length,
        generator=torch.Generator("cpu").manual_seed(request.seed),
    ).images[0]
    return np.asarray(image).astype(int)
