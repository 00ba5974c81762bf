"""Packing support of models: which ones run without padding, and their preparation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface

from genserve_backend.rerank.attention import PACKED, packed_attention
from genserve_backend.rerank.last_layer import LastLayer, replace_last_layer

_PACKABLE = frozenset(
    {"bert", "camembert", "llama", "mistral", "modernbert", "qwen2", "qwen3", "roberta", "xlm-roberta"}
)
"""Model types whose forward accepts positions and passes further arguments on to the attention."""


def can_pack(model: Any) -> bool:
    """Return whether `model` can run packed batches."""
    config = model.config
    return config.model_type in _PACKABLE and getattr(config, "classifier_pooling", "cls") == "cls"


def prepare_packing(model: Any, *, one_position: bool) -> None:
    """Replace the attention of `model` by one for packed batches.

    Args:
        model: One that `can_pack` accepts.
        one_position: Whether the output of a sequence is made from one position. The last layer then computes only
            that.
    """
    model.set_attn_implementation(PACKED)
    if one_position:
        replace_last_layer(model)


def compile_model(model: Any) -> None:
    """Compile `model` with torch.compile, once for all lengths.

    Parts that look at the packing are left out: they would be compiled again for every batch.
    """
    disable: Callable[[Any], Any] = torch.compiler.disable
    AttentionInterface.register(PACKED, disable(packed_attention))
    for part in model.modules():
        if isinstance(part, LastLayer):
            part.forward = disable(part.forward)  # type: ignore[method-assign]
    model.compile(dynamic=True)


def uncompile_model(model: Any) -> None:
    """Undo `compile_model`."""
    AttentionInterface.register(PACKED, packed_attention)
    for part in model.modules():
        if isinstance(part, LastLayer):
            part.__dict__.pop("forward", None)
    model._compiled_call_impl = None
