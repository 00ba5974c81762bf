"""Checked weights of an adapter: every product belongs to a layer of the model, has its shape, and is finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from genserve_backend.errors import shorten
from genserve_backend.flux.lora.folder import AdapterError
from genserve_backend.flux.lora.key_formats import Factors, parse
from genserve_backend.flux.lora.scales import Scales

DOWN, UP = ".lora_A.weight", ".lora_B.weight"


class Shape(NamedTuple):
    """Features of a linear layer."""

    inputs: int
    outputs: int


class LowRank(NamedTuple):
    """A layer's change: ``x @ down @ up``."""

    down: torch.Tensor
    """``[inputs, rank]``."""
    up: torch.Tensor
    """``[rank, outputs]``, with the adapter's scale."""

    @property
    def rank(self) -> int:
        """Columns of `down`."""
        return self.down.shape[1]


Weights = dict[str, dict[str, LowRank]]
"""Products by part of the pipeline and by layer."""


def read_weights(
    data: bytes, shapes: Mapping[str, Mapping[str, Shape]], *, max_rank: int, dtype: torch.dtype
) -> Weights:
    """Return the products in a safetensors file, in host memory.

    Args:
        data: The file.
        shapes: Shapes of the layers that can be adapted, by part and layer.
        max_rank: Limit on the rank.
        dtype: The model's dtype.

    Raises:
        AdapterError: The file is damaged or does not fit the model.
    """
    weights: Weights = {}
    for part, parsed in parse(data).items():
        factors = _named(parsed, shapes.get(part, {}))
        scales = Scales(factors)
        weights[part] = {
            layer: _product(factors, scales, layer, shape, max_rank=max_rank, dtype=dtype)
            for layer, shape in _layers(part, factors, shapes.get(part, {})).items()
        }
    return weights


def _named(factors: Factors, shapes: Mapping[str, Shape]) -> Factors:
    """Return the factors with the layer names of the installed transformers: its CLIP has lost a level of names."""
    if any(layer.startswith("text_model.") for layer in shapes):
        return factors
    tensors = {key.removeprefix("text_model."): tensor for key, tensor in factors.tensors.items()}
    return factors._replace(tensors=tensors)


def _layers(part: str, factors: Factors, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the layers that the factors name, with their shapes."""
    layers: dict[str, Shape] = {}
    for key in factors.tensors:
        suffix = next((suffix for suffix in (DOWN, UP) if key.endswith(suffix)), "")
        layer = key.removesuffix(suffix)
        if not suffix or layer not in shapes:
            raise AdapterError(f"its layer {shorten(layer)} is not in the model's {part}")
        layers[layer] = shapes[layer]
    return layers


def _product(
    factors: Factors, scales: Scales, layer: str, shape: Shape, *, max_rank: int, dtype: torch.dtype
) -> LowRank:
    down, up = (factors.tensors.get(layer + suffix) for suffix in (DOWN, UP))
    if down is None or up is None:
        raise AdapterError(f"its layer {layer} lacks one of two factors")
    rank = down.shape[0] if down.dim() == 2 else 0
    if not rank or tuple(down.shape) != (rank, shape.inputs) or tuple(up.shape) != (shape.outputs, rank):
        found = f"{tuple(down.shape)} and {tuple(up.shape)}"
        wanted = f"(rank, {shape.inputs}) and ({shape.outputs}, rank)"
        raise AdapterError(f"the factors of its layer {layer} have the shapes {found}; allowed: {wanted}")
    if rank > max_rank:
        raise AdapterError(f"its layer {layer} has rank {rank:,}; allowed: at most {max_rank:,}")
    scaled = up.T.float() * scales.of(layer, rank)
    low_rank = LowRank(down.T.to(dtype).contiguous(), scaled.to(dtype).contiguous())
    if not all(torch.isfinite(factor).all() for factor in low_rank):
        raise AdapterError(f"the factors of its layer {layer} are not finite as {str(dtype).removeprefix('torch.')}")
    return low_rank
