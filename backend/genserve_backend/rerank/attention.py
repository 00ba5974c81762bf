"""Attention over packed sequences: one batch row of tokens without padding, where each sequence attends only to itself.

transformers' models look up their attention function by a name in the configuration and pass it the keyword arguments
of their forward. So the models are used unchanged; only their inputs are laid out differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from genserve_backend.rerank import varlen
from genserve_backend.rerank.prefix_store import PrefixRows
from genserve_backend.rerank.varlen import Offsets

PACKED = "genserve_packed"
"""The name for ``config._attn_implementation``."""


@dataclass
class Packing:
    """The sequences of a packed batch.

    Args:
        lengths: Tokens of each sequence, in order.
        last: Whether the output position of a sequence is its last token; otherwise it is the first.
        key_lengths: Keys that each sequence attends to: its prefix's and its own; by default `lengths`. Only causal
            attention has prefixes.
        prefix_rows: The prefixes' keys and values; None if no sequence has a prefix.

    Attributes:
        output_positions: int32 ``[sequences]`` on the device: the position among all tokens that the output of each
            sequence is made from.
        tokens: int32 ``[sequences]`` on the device: `lengths`.
        query_offsets: Offsets of the sequences among all tokens, for the kernel.
        key_offsets: The same, with the prefixes.
    """

    lengths: Sequence[int]
    last: bool = False
    key_lengths: Sequence[int] = ()
    prefix_rows: PrefixRows | None = None
    output_positions: Tensor = field(init=False)
    tokens: Tensor = field(init=False)
    query_offsets: Offsets = field(init=False)
    key_offsets: Offsets = field(init=False)

    def __post_init__(self) -> None:
        self.key_lengths = self.key_lengths or self.lengths
        self.ends = list(accumulate(self.lengths))
        """The end of each sequence among all tokens."""
        self.key_ends = list(accumulate(self.key_lengths))
        """The same among all keys."""

    @property
    def index_arrays(self) -> list[NDArray[np.int32]]:
        """The arguments of `set_indices`, to be copied to the device."""
        output_positions = [end - 1 for end in self.ends] if self.last else [0, *self.ends[:-1]]
        lists = (output_positions, self.lengths, [0, *self.ends], [0, *self.key_ends])
        return [np.array(each, dtype=np.int32) for each in lists]

    def set_indices(self, output_positions: Tensor, tokens: Tensor, query_offsets: Tensor, key_offsets: Tensor) -> None:
        """Store `index_arrays` as tensors on the device."""
        self.output_positions, self.tokens = output_positions, tokens
        self.query_offsets = Offsets(query_offsets, max(self.lengths))
        self.key_offsets = Offsets(key_offsets, max(self.key_lengths))

    @cached_property
    def output_offsets(self) -> Offsets:
        """Offsets of one query per sequence."""
        count = len(self.lengths)
        return Offsets(torch.arange(count + 1, dtype=torch.int32, device=self.output_positions.device), 1)


def choose_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Choose the attention kernels of a GPU before the first request; do nothing on a CPU."""
    if device.type == "cuda":
        # cuDNN makes a plan for every new combination of sizes and strides, and keeps them all.
        torch.backends.cuda.enable_cudnn_sdp(False)
        if dtype in varlen.DTYPES:
            varlen.find_kernel(device, dtype)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: None,
    *,
    packing: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    one_position: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention over ``[1, heads, tokens, head]``, with the signature that transformers calls.

    Args:
        module: The attention layer, with its layer index and whether it is causal.
        query: Queries of all tokens, or of the output positions only.
        key: Keys of all tokens; may have fewer heads.
        value: The same.
        packing: The sequences.
        scaling: Scale of the scores; by default one over the square root of the head width.
        sliding_window: Distance to both sides that a token attends to, counting its own position; None for no limit.
        one_position: Whether `query` holds only `Packing.output_positions`.

    Returns:
        ``[1, queries, heads, head]``, and no weights.
    """
    if packing.prefix_rows is not None:
        key, value = packing.prefix_rows.with_prefixes(module.layer_idx, key, value)
    causal = bool(module.is_causal)
    attended = attend(
        query,
        key,
        value,
        packing=packing,
        causal=causal,
        scaling=scaling,
        sliding_window=sliding_window,
        one_position=one_position,
    )
    return attended, None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    packing: Packing,
    causal: bool,
    scaling: float | None,
    sliding_window: int | None,
    one_position: bool,
) -> Tensor:
    """Compute `packed_attention` for keys and values that have their prefixes: ``[1, queries, heads, head]``."""
    # The kernel takes queries as the last tokens of their sequence, so a first token works only without a mask.
    if varlen.serves(query) and not (one_position and not packing.last and (causal or sliding_window)):
        return varlen.attend(
            query,
            key,
            value,
            query_offsets=packing.output_offsets if one_position else packing.query_offsets,
            key_offsets=packing.key_offsets,
            causal=causal,
            window=sliding_window,
            scaling=scaling,
        )
    grouped = key.shape[1] != query.shape[1]
    parts = []
    for index, (length, end) in enumerate(zip(packing.lengths, packing.ends, strict=True)):
        queries = query[:, :, index : index + 1] if one_position else query[:, :, end - length : end]
        count, key_end = packing.key_lengths[index], packing.key_ends[index]
        keys, values = key[:, :, key_end - count : key_end], value[:, :, key_end - count : key_end]
        if not one_position:
            positions = range(count - length, count)
        else:
            positions = range(count - 1, count) if packing.last else range(1)
        is_causal, mask = _mask_for(positions, count, causal=causal, window=sliding_window, device=query.device)
        parts.append(
            functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, is_causal=is_causal, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2)


def _mask_for(
    queries: range, keys: int, *, causal: bool, window: int | None, device: torch.device
) -> tuple[bool, Tensor | None]:
    """Return `is_causal` and `attn_mask` for the queries at these positions, the cheapest that are correct."""
    windowed = window is not None and window < keys
    if not windowed and (not causal or queries.start == keys - 1):
        return False, None
    if not windowed and len(queries) == keys:
        return True, None
    key_positions = torch.arange(keys, device=device)
    query_positions = key_positions[queries.start : queries.stop, None]
    if causal:
        mask = key_positions <= query_positions
    else:
        mask = torch.ones(len(queries), keys, dtype=torch.bool, device=device)
    if windowed and window is not None:
        mask = mask & ((key_positions - query_positions).abs() < window)
    return False, mask


AttentionInterface.register(PACKED, packed_attention)
