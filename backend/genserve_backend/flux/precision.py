"""Placement of FLUX's weights: quantized as the settings say, on the device or in host memory."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from diffusers import FluxPipeline
from torch import nn

from genserve_backend.checkpoints import CheckpointError
from genserve_backend.flux import offload
from genserve_backend.flux.dtypes import FORMS, Form, t5_form, transformer_form, unsupported
from genserve_backend.flux.memory import TILE_SHARE
from genserve_backend.flux.quantized import Float8Linear, Int8WeightLinear
from genserve_backend.logs import log
from genserve_backend.matrices import Int8Linear, has_int8, use_packed_matrices
from genserve_backend.settings import FluxSettings

LAYERS: dict[Form, Callable[[nn.Linear], nn.Module]] = {
    "fp8": Float8Linear,
    "int8": Int8Linear,
    "int8wo": Int8WeightLinear,
}

logger = logging.getLogger(__name__)


def require_support(settings: FluxSettings, device: str) -> None:
    """Raise CheckpointError if the device cannot run FLUX_DTYPE."""
    capability = torch.cuda.get_device_capability(device) if device.startswith("cuda") else None
    if reason := unsupported(settings.dtype, device, capability=capability, has_int8=has_int8()):
        raise CheckpointError(reason)


def starts_on_host(settings: FluxSettings, device: str) -> bool:
    """Return whether weights have to be loaded into host memory first: those that the GPU would have no room for."""
    changed = settings.dtype in FORMS or settings.t5_dtype != "auto" or settings.offload != "none"
    return device.startswith("cuda") and changed


def place(pipeline: FluxPipeline, settings: FluxSettings, device: str) -> None:
    """Quantize the weights of a pipeline and bring them to their places.

    Args:
        pipeline: The pipeline, on the host or already on the device.
        settings: The dtypes, the offload and the tiling.
        device: The device of the engine, in torch's notation.
    """
    quantize(pipeline, settings, device)
    if settings.vae_tiling:
        tile(pipeline)
    if settings.offload != "none" and device.startswith("cuda"):
        offload.apply(pipeline, settings.offload, torch.device(device))
        return
    if settings.offload != "none":
        log(logger, logging.WARNING, "FLUX_OFFLOAD has no effect on a CPU", offload=settings.offload)
    pipeline.to(device)
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae):
        use_packed_matrices(part)


def quantize(pipeline: FluxPipeline, settings: FluxSettings, device: str) -> None:
    """Replace the linear layers whose dtype the settings change. Each is quantized on `device`, and stays where it was.

    The device is not checked, see `require_support`.
    """
    if settings.dtype in FORMS:
        _replace(pipeline.transformer, lambda name: transformer_form(name, settings.dtype), device)
    if settings.t5_dtype != "auto":
        _replace(pipeline.text_encoder_2, lambda name: t5_form(name, settings.t5_dtype), device)


def tile(pipeline: FluxPipeline) -> None:
    """Let the VAE work in overlapping tiles, one image at a time.

    diffusers' own tiles have the native size, so that images of that size are not tiled.
    """
    vae = pipeline.vae
    vae.enable_tiling()
    vae.enable_slicing()
    vae.tile_sample_min_size //= TILE_SHARE
    vae.tile_latent_min_size //= TILE_SHARE


def dtype_name(settings: FluxSettings, loaded: torch.dtype) -> str:
    """Return the dtype for INFO and metadata: FLUX_DTYPE if it quantizes, else that of the weights."""
    return settings.dtype if settings.dtype in FORMS else str(loaded).removeprefix("torch.")


def _replace(model: nn.Module, form_of: Callable[[str], Form | None], device: str) -> None:
    for parent_name, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear:
                continue
            form = form_of(f"{parent_name}.{name}" if parent_name else name)
            if form:
                home = child.weight.device
                setattr(parent, name, LAYERS[form](child.to(device)).to(home))
