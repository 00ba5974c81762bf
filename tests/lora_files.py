"""Random LoRA adapters in several key formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors.torch import save_file
from torch import nn

from genserve_backend.flux.lora.folder import WEIGHTS_FILE
from genserve_backend.flux.lora.weights import Shape

Tensors = dict[str, torch.Tensor]
ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0", ".add_q_proj", ".add_v_proj")
STRENGTH = 0.4
"""Deviation of an adapter's change, relative to that of the layer's output."""


def shapes(model: nn.Module) -> dict[str, Shape]:
    """Return the shapes of the linear layers of a model, by name."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    return {name: Shape(layer.in_features, layer.out_features) for name, layer in layers.items()}


def factors(shape: Shape, rank: int, *, strength: float = STRENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random ``[rank, in]`` and ``[out, rank]``."""
    down = torch.randn(rank, shape.inputs) / shape.inputs**0.5
    return down, torch.randn(shape.outputs, rank) * strength / rank**0.5


def diffusers_keys(layers: Mapping[str, Shape], rank: int, *, prefix: str = "transformer", seed: int = 0) -> Tensors:
    """Return an adapter with the keys of diffusers and PEFT."""
    torch.manual_seed(seed)
    tensors: Tensors = {}
    for name, shape in layers.items():
        down, up = factors(shape, rank)
        tensors |= {f"{prefix}.{name}.lora_A.weight": down, f"{prefix}.{name}.lora_B.weight": up}
    return tensors


def old_diffusers_keys(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Return the same adapter with diffusers' keys from before PEFT."""
    renamed = {".lora_A.weight": ".lora.down.weight", ".lora_B.weight": ".lora.up.weight"}
    return {key[:-14] + renamed[key[-14:]]: tensor for key, tensor in tensors.items()}


def kohya_keys(transformer: FluxTransformer2DModel, rank: int, *, alpha: float, seed: int = 0) -> Tensors:
    """Return an adapter of some layers with Kohya's keys: projections together, and an alpha each.

    Those of single blocks are left out: diffusers' converter expects their size in FLUX.1.
    """
    torch.manual_seed(seed)
    width = transformer.inner_dim
    text = transformer.config.pooled_projection_dim
    layers = {
        "lora_unet_double_blocks_0_img_attn_qkv": Shape(width, 3 * width),
        "lora_unet_double_blocks_0_img_attn_proj": Shape(width, width),
        "lora_unet_double_blocks_1_txt_attn_qkv": Shape(width, 3 * width),
        "lora_unet_double_blocks_1_img_mlp_0": Shape(width, 4 * width),
        "lora_unet_double_blocks_1_img_mod_lin": Shape(width, 6 * width),
        "lora_unet_single_blocks_0_linear2": Shape(5 * width, width),
        "lora_unet_single_blocks_1_modulation_lin": Shape(width, 3 * width),
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": Shape(text, text),
        "lora_te1_text_model_encoder_layers_1_self_attn_out_proj": Shape(text, text),
        "lora_te1_text_model_encoder_layers_1_mlp_fc1": Shape(text, 2 * text),
    }
    tensors: Tensors = {}
    for name, shape in layers.items():
        down, up = factors(shape, rank, strength=2 * STRENGTH)
        tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(alpha),
        }
    return tensors


def write(folder: Path, name: str, tensors: Mapping[str, torch.Tensor], metadata: Any = None) -> Path:
    """Write ``NAME.safetensors``, with the arguments of PEFT's ``LoraConfig`` if given; return its path."""
    path = folder / f"{name}.safetensors"
    header = None if metadata is None else {LORA_ADAPTER_METADATA_KEY: json.dumps(metadata)}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=header)
    return path


def write_folder(folder: Path, name: str, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write ``NAME/pytorch_lora_weights.safetensors``; return its path."""
    (folder / name).mkdir()
    path = folder / name / WEIGHTS_FILE
    save_file(dict(tensors), path)
    return path
