"""Attention over packed sequences in one kernel: FlashAttention for sequences of any lengths, as torch has it for GPUs.

Elsewhere `attention` goes through the sequences one by one, which costs a GPU a launch for each of them in each layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch
    varlen_attn = None

_SUFFICES = varlen_attn is not None and (
    {"window_size", "enable_gqa", "num_splits"} <= inspect.signature(varlen_attn).parameters.keys()
)
"""Whether this torch has the kernel, with all that is asked of it."""
_MAX_HEAD = 256
"""The widest head that FlashAttention takes."""


def serves(query: Tensor) -> bool:
    """Whether `query`, ``[1, heads, tokens, head]``, can be attended to here: half precision, on a GPU."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= _MAX_HEAD
        and query.shape[-1] % 8 == 0
        and _SUFFICES
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    causal: bool,
    window: int | None,
    scaling: float | None,
) -> Tensor:
    """Each sequence's queries to its own keys; where they are fewer, they are the last of them.

    Args:
        query: ``[1, heads, sum of query_lengths, head]``.
        key: ``[1, heads, sum of key_lengths, head]``; may have fewer heads.
        value: The same.
        query_lengths: Of each sequence.
        key_lengths: Of each sequence, what it continues among them.
        causal: Whether a token looks only at itself and those before it.
        window: How far a token sees to both sides, its own position counted in; None for everything.
        scaling: Of the scores; by default one over the root of the head's width.

    Returns:
        ``[1, queries, heads, head]``.
    """
    reach = -1 if window is None else window - 1
    attended: Tensor = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        _offsets(tuple(query_lengths), query.device),
        _offsets(tuple(key_lengths), query.device),
        max(query_lengths),
        max(key_lengths),
        scale=scaling,
        window_size=(reach, 0 if causal else reach),
        enable_gqa=key.shape[1] != query.shape[1],
        num_splits=1,  # or a score would depend on what else is in the batch
    )
    return attended[None]


@lru_cache(maxsize=8)  # the same for all layers of a forward
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return offsets.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else offsets
