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

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from genserve_backend.devices import move
from genserve_backend.rerank import varlen
from genserve_backend.rerank.varlen import Offsets

PACKED = "genserve_packed"
"""The name for ``config._attn_implementation``."""


@dataclass(frozen=True)
class KeysValues:
    """The keys and values of a prefix."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    """Per layer: keys and values, ``[1, heads, tokens, head]``."""

    @property
    def length(self) -> int:
        """Tokens."""
        return self.layers[0][0].shape[2]

    @property
    def nbytes(self) -> int:
        """Device memory."""
        return sum(each.nbytes for pair in self.layers for each in pair)


@dataclass
class Packing:
    """The sequences of a packed batch.

    Args:
        lengths: Tokens of each sequence, in order.
        last: Whether the output position of a sequence is its last token; otherwise it is the first.
        prefixes: The prefix that each sequence continues, or None; only for causal attention.
        capture: Whether to keep the keys and values of all tokens.

    Attributes:
        output_positions: int64 ``[sequences]`` on the device: the position among all tokens that the output of each
            sequence is made from.
        tokens: int64 ``[sequences]`` on the device: `lengths`.
        query_offsets: Offsets of the sequences among all tokens, for the kernel.
        key_offsets: The same, with the prefixes.
    """

    lengths: Sequence[int]
    last: bool = False
    prefixes: Sequence[KeysValues | None] = ()
    capture: bool = False
    captured: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By layer, if `capture`."""
    output_positions: Tensor = field(init=False)
    tokens: Tensor = field(init=False)
    query_offsets: Offsets = field(init=False)
    key_offsets: Offsets = field(init=False)

    def __post_init__(self) -> None:
        self.ends = list(accumulate(self.lengths))
        """The end of each sequence among all tokens."""

    @property
    def index_lists(self) -> list[list[int]]:
        """The arguments of `set_indices`, to be copied to the device."""
        output_positions = [end - 1 for end in self.ends] if self.last else [0, *self.ends[:-1]]
        return [output_positions, list(self.lengths), [0, *self.ends], [0, *accumulate(self._key_lengths)]]

    def set_indices(self, output_positions: Tensor, tokens: Tensor, query_offsets: Tensor, key_offsets: Tensor) -> None:
        """Store `index_lists` as tensors on the device."""
        self.output_positions, self.tokens = output_positions, tokens
        self.query_offsets = Offsets(query_offsets.to(torch.int32), max(self.lengths))
        self.key_offsets = Offsets(key_offsets.to(torch.int32), max(self._key_lengths))

    @cached_property
    def output_offsets(self) -> Offsets:
        """Offsets of one query per sequence."""
        count = len(self.lengths)
        return Offsets(torch.arange(count + 1, dtype=torch.int32, device=self.output_positions.device), 1)

    @cached_property
    def _key_lengths(self) -> list[int]:
        return [self.prefix_length(index) + length for index, length in enumerate(self.lengths)]

    def prefix_length(self, sequence: int) -> int:
        """Return the tokens of the prefix that a sequence continues."""
        prefix = self.prefix(sequence)
        return 0 if prefix is None else prefix.length

    def prefix(self, sequence: int) -> KeysValues | None:
        """Return the prefix that a sequence continues."""
        return self.prefixes[sequence] if self.prefixes else None

    def with_prefixes(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all tokens, each sequence's preceded by those of its prefix."""
        prefixes, sources = self._sources
        if not prefixes:
            return key, value
        keys, values = zip(*(prefix.layers[layer] for prefix in prefixes), strict=True)
        return (
            torch.cat([*keys, key], dim=2).index_select(2, sources),
            torch.cat([*values, value], dim=2).index_select(2, sources),
        )

    @cached_property
    def _sources(self) -> tuple[list[KeysValues], Tensor]:
        """The distinct prefixes, and for each key its index in the concatenation of them and all tokens.

        They are the same for every layer. Gathering takes a few copies per layer; slices of each sequence would take
        hundreds.
        """
        prefixes = list({id(prefix): prefix for prefix in self.prefixes if prefix is not None}.values())
        ends = list(accumulate(prefix.length for prefix in prefixes))
        starts = {id(prefix): end - prefix.length for prefix, end in zip(prefixes, ends, strict=True)}
        offset = ends[-1] if ends else 0
        sources: list[int] = []
        for index, (length, end) in enumerate(zip(self.lengths, self.ends, strict=True)):
            if (prefix := self.prefix(index)) is not None:
                start = starts[id(prefix)]
                sources += range(start, start + prefix.length)
            sources += range(offset + end - length, offset + end)
        return prefixes, move(torch.tensor(sources), self.output_positions.device)

    def keys_values(self, sequence: int) -> KeysValues:
        """Return the captured keys and values of a sequence, preceded by those of its prefix."""
        end = self.ends[sequence]
        start = end - self.lengths[sequence]
        prefix = self.prefix(sequence)
        layers = []
        for layer in range(len(self.captured)):
            pair = [each[:, :, start:end] for each in self.captured[layer]]
            if prefix is not None:
                pair = [torch.cat(parts, dim=2) for parts in zip(prefix.layers[layer], pair, strict=True)]
            # A copy, because a slice would keep the tensors of the whole forward in memory.
            layers.append((pair[0].clone(), pair[1].clone()))
        return KeysValues(tuple(layers))


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
    if packing.capture:
        packing.captured[module.layer_idx] = (key, value)
    causal = bool(module.is_causal)
    # The kernel takes queries as the last tokens of their sequence, so a first token works only without a mask.
    if varlen.serves(query) and not (one_position and not packing.last and (causal or sliding_window)):
        keys, values = packing.with_prefixes(module.layer_idx, key, value)
        attended = varlen.attend(
            query,
            keys,
            values,
            query_offsets=packing.output_offsets if one_position else packing.query_offsets,
            key_offsets=packing.key_offsets,
            causal=causal,
            window=sliding_window,
            scaling=scaling,
        )
        return attended, None
    grouped = key.shape[1] != query.shape[1]
    parts = []
    for index, (length, end) in enumerate(zip(packing.lengths, packing.ends, strict=True)):
        start = end - length
        queries = query[:, :, index : index + 1] if one_position else query[:, :, start:end]
        keys, values = key[:, :, start:end], value[:, :, start:end]
        if (prefix := packing.prefix(index)) is not None:
            before = prefix.layers[module.layer_idx]
            keys, values = torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)
        count = keys.shape[2]
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
    return torch.cat(parts, dim=2).transpose(1, 2), None


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
