"""Which models run without padding, and how they are made to."""

from __future__ import annotations

from typing import Any

from genserve_backend.rerank.attention import PACKED
from genserve_backend.rerank.last_layer import ask_one_position

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
