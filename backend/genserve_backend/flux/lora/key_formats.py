"""Key formats of adapter files: diffusers, PEFT, Kohya and others, through diffusers' own converters.

The result is what ``FluxPipeline.load_lora_weights`` passes to PEFT. What diffusers would drop silently is an error
here, unless it is zero.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import safetensors.torch
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)

from genserve_backend.errors import shorten
from genserve_backend.flux.lora.folder import AdapterError

TRANSFORMER, TEXT_ENCODER = "transformer", "text_encoder"
PARTS = (TRANSFORMER, TEXT_ENCODER)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOW_RANK = re.compile(r"(lora_A|lora_B|lora_down|lora_up|\.down|\.up)\.weight$")
"""End of the keys that hold a factor of a low-rank product."""
UNSUPPORTED = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr": "LoKr",
    "hada": "LoHa",
    "oft": "OFT",
    "norm": "changed norms",
    "diff": "changed weights",
    "bias": "changed biases",
}
"""Kinds of adapters that are no low-rank products, by a part of their keys."""
NOT_ADAPTED = ("t5xxl", "lora_te2_", "lora_te3_", "text_encoder_2.", "position_embedding", "text_projection")
"""Parts of keys for layers that diffusers does not adapt."""
KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_transformer_", "diffusion_model.", "text_encoders.clip_l.")
"""Prefixes that diffusers' converter of Kohya's keys reads; it drops all others."""


class Factors(NamedTuple):
    """The low-rank products of one part, before their scale."""

    tensors: dict[str, torch.Tensor]
    """By ``LAYER.lora_A.weight``, ``[rank, in]``, and ``LAYER.lora_B.weight``, ``[out, rank]``."""
    alphas: dict[str, torch.Tensor]
    """Scales by ``LAYER.alpha``, where they are not part of the tensors."""
    metadata: dict[str, Any] | None
    """Arguments of PEFT's ``LoraConfig``, if the file has them."""


def parse(data: bytes) -> dict[str, Factors]:
    """Return the products in a file by part of the pipeline, with layers named as diffusers and transformers do.

    Raises:
        AdapterError: The file is damaged, or holds anything but low-rank products of these parts.
    """
    tensors, metadata = _deserialize(data)
    tensors = _supported(tensors)
    try:
        state, alphas = FluxLoraLoaderMixin.lora_state_dict(tensors, return_alphas=True)
        parts = {part: _part(part, state, alphas or {}, metadata) for part in PARTS}
    except AdapterError:
        raise
    except Exception as error:  # the converters raise whatever their indexing and arithmetic does
        raise AdapterError(
            f"diffusers cannot convert its keys: {shorten(str(error) or type(error).__name__)}"
        ) from None
    for key in state:
        if not key.startswith(tuple(f"{part}." for part in PARTS)):
            raise AdapterError(f"its key {shorten(key)} belongs to no part of the pipeline")
    found = {part: factors for part, factors in parts.items() if factors.tensors}
    if not found:
        raise AdapterError("its file holds no low-rank products")
    return found


def _deserialize(data: bytes) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Return the tensors of a safetensors file, and the ``LoraConfig`` in its header."""
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        text = header.get("__metadata__", {}).get(LORA_ADAPTER_METADATA_KEY)
        metadata = json.loads(text) if text else None
    except Exception:  # a damaged file raises whatever the parsers do
        raise AdapterError("its file is damaged, or no safetensors file") from None
    if metadata is not None and not isinstance(metadata, dict):
        raise AdapterError("the metadata of its file are damaged")
    return tensors, metadata


def _supported(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors that take part; raise AdapterError for one that would be dropped although it is not zero."""
    kohya = any(".lora_down.weight" in key for key in tensors) and not any(
        key.startswith(f"{TRANSFORMER}.") for key in tensors
    )
    found = {}
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise AdapterError(f"its tensor {shorten(key)} has the dtype {str(tensor.dtype).removeprefix('torch.')}")
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"its tensor {shorten(key)} is not finite")
        is_alpha = key.endswith(".alpha")
        # diffusers' converters never end with a scale below zero.
        if is_alpha and (tensor.numel() != 1 or tensor.item() < 0):
            raise AdapterError(f"its scale {shorten(key)} is no number from 0 on")
        reason = "" if is_alpha or LOW_RANK.search(key) else _kind(key)
        if any(name in key for name in NOT_ADAPTED):
            reason = "changes of layers that diffusers does not adapt"
        elif kohya and not key.startswith(KOHYA):
            reason = "keys of an unknown format"
        if not reason:
            found[key] = tensor
        elif not is_alpha and tensor.any():
            raise AdapterError(f"its key {shorten(key)} stands for {reason}, which is not supported")
    return found


def _kind(key: str) -> str:
    return next((kind for mark, kind in UNSUPPORTED.items() if mark in key), "something else than a low-rank product")


def _part(
    part: str, state: Mapping[str, torch.Tensor], alphas: Mapping[str, torch.Tensor], metadata: dict[str, Any] | None
) -> Factors:
    """Return the tensors of a part with PEFT's keys, as ``load_lora_adapter`` and its kin for the text encoder do."""
    prefix = f"{part}."
    own = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    if own and part == TEXT_ENCODER:
        own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
    elif own and "lora_A" not in next(iter(own)):
        own = convert_unet_state_dict_to_peft(own)
    own_metadata = None
    if metadata is not None:
        own_metadata = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if alphas and own_metadata:
        raise AdapterError("its file has scales both as tensors and as metadata")
    own_alphas = {key.removeprefix(prefix): alpha for key, alpha in alphas.items() if key.startswith(prefix)}
    return Factors(own, own_alphas, own_metadata)
