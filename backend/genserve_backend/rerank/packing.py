"""Which models run without padding, and how they are made to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface

from genserve_backend.rerank.attention import PACKED, packed_attention
from genserve_backend.rerank.last_layer import OnePosition, ask_one_position

_PACKABLE = frozenset(
    {"bert", "camembert", "llama", "mistral", "modernbert", "qwen2", "qwen3", "roberta", "xlm-roberta"}
)
"""Model types whose forward takes positions, and hands what else it is given down to the attention."""


def can_pack(model: Any) -> bool:
    """Whether a forward of `model` can take all tokens in one row."""
    config = model.config
    return config.model_type in _PACKABLE and getattr(config, "classifier_pooling", "cls") == "cls"


def prepare_packing(model: Any, *, one_position: bool) -> None:
    """Give `model` an attention for packed rows.

    Args:
        model: One that `can_pack` accepts.
        one_position: Whether only one position of each sequence is of interest in the end.
    """
    model.set_attn_implementation(PACKED)
    if one_position:
        ask_one_position(model)


def compile_model(model: Any) -> None:
    """Have torch.compile fuse what lies between the matrices of `model`, once for all lengths.

    What looks at the packing stays as it is: it would be compiled anew for every batch.
    """
    as_it_is: Callable[[Any], Any] = torch.compiler.disable
    AttentionInterface.register(PACKED, as_it_is(packed_attention))
    for part in model.modules():
        if isinstance(part, OnePosition):
            part.forward = as_it_is(part.forward)  # type: ignore[method-assign]
    model.compile(dynamic=True)
