"""Quantized dtypes of FLUX: the form of each matrix, and the devices they need. Does not import torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from genserve_backend.settings import FluxDType

Form = Literal["fp8", "int8", "int8wo"]
"""Form of a matrix: float8 or int8 products, or int8 weights that are multiplied in the dtype of their inputs."""

FP8_CAPABILITY = (8, 9)
"""First compute capability with float8 products: Ada Lovelace. Hopper is 9.0."""

_BLOCK = re.compile(r"(single_)?transformer_blocks\.\d+\.")
_MODULATION = re.compile(r"(single_)?transformer_blocks\.\d+\.norm\w*\.linear")
_T5_BLOCK = re.compile(r"encoder\.block\.\d+\.")


@dataclass(frozen=True)
class Quantized:
    """Forms of the transformer's matrices in one dtype.

    Embedders, the last modulation and the last projection keep the dtype of the weights: they are small, and their
    errors go into every block or straight into the image.
    """

    blocks: Form
    """Attention and feed-forward of every block."""
    modulation: Form | None
    """Modulation (AdaLN) of every block; None keeps it. A quarter of FLUX.1's weights, multiplied by one row per image:
    its speed does not matter, its size does."""


FORMS: dict[FluxDType, Quantized] = {
    "fp8": Quantized(blocks="fp8", modulation="int8wo"),
    "int8": Quantized(blocks="int8", modulation=None),
    "int8wo": Quantized(blocks="int8wo", modulation="int8wo"),
}
"""The transformer's matrices by FLUX_DTYPE; the dtypes that are not here quantize nothing."""


def transformer_form(layer: str, dtype: FluxDType) -> Form | None:
    """Return the form of a linear layer of the transformer by its name, as ``transformer_blocks.0.attn.to_q``."""
    forms = FORMS.get(dtype)
    if forms is None or not _BLOCK.match(layer):
        return None
    return forms.modulation if _MODULATION.fullmatch(layer) else forms.blocks


def t5_form(layer: str, dtype: Literal["auto", "int8wo"]) -> Form | None:
    """Return the form of a linear layer of T5 by its name; the embedding keeps its dtype."""
    return "int8wo" if dtype == "int8wo" and _T5_BLOCK.match(layer) else None


def unsupported(
    dtype: FluxDType, device: str, *, capability: tuple[int, int] | None = None, has_int8: bool = False
) -> str | None:
    """Return the reason why a device cannot run a dtype; None if it can.

    Args:
        dtype: FLUX_DTYPE.
        device: The device in torch's notation.
        capability: A GPU's compute capability; None if it is unknown, which rejects nothing.
        has_int8: True for a CPU that has VNNI.
    """
    on_gpu = device.startswith("cuda")
    if dtype == "int8" and (on_gpu or not has_int8):
        return f"FLUX_DTYPE=int8 needs a CPU that has VNNI, and this instance is on {device}; int8wo runs everywhere"
    if dtype == "fp8" and not on_gpu:
        return f"FLUX_DTYPE=fp8 needs a GPU of capability 8.9 or higher, and this instance is on {device}"
    if dtype == "fp8" and capability is not None and capability < FP8_CAPABILITY:
        has = ".".join(map(str, capability))
        return f"FLUX_DTYPE=fp8 needs a GPU of capability 8.9 or higher, and {device} has {has}; int8wo runs everywhere"
    return None
