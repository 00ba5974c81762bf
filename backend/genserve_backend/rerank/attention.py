"""Attention over packed sequences: one row of tokens without padding, in which each sequence sees only itself.

transformers' models take the attention function by name from their configuration and pass it the keyword arguments of
their forward. So the models are transformers' own; only what goes through them is laid out differently.
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
    """What attention has to know of a prefix: for each layer its keys and values, ``[1, heads, tokens, head]``."""

    layers: tuple[tuple[Tensor, Tensor], ...]

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
    """Which of the packed tokens belong together.

    Args:
        lengths: Tokens of each sequence, in order.
        last: Whether the one position that is asked of a sequence is its last; else it is the first.
        prefixes: What each sequence continues, or None; only where attention is causal.
        keep: Whether to gather the keys and values of all tokens.

    Attributes:
        asked: int64 ``[sequences]`` on the device: the position that is asked of each, in the row of all tokens.
        tokens: int64 ``[sequences]`` on the device: `lengths`.
        query_offsets: Of all tokens, for the kernel.
        key_offsets: The same, with what each sequence continues.
    """

    lengths: Sequence[int]
    last: bool = False
    prefixes: Sequence[KeysValues | None] = ()
    keep: bool = False
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By layer, if `keep`."""
    asked: Tensor = field(init=False)
    tokens: Tensor = field(init=False)
    query_offsets: Offsets = field(init=False)
    key_offsets: Offsets = field(init=False)

    def __post_init__(self) -> None:
        self.ends = list(accumulate(self.lengths))
        """Where each sequence ends."""

    @property
    def index_rows(self) -> list[list[int]]:
        """The integers that `place` expects on the device."""
        asked = [end - 1 for end in self.ends] if self.last else [0, *self.ends[:-1]]
        return [asked, list(self.lengths), [0, *self.ends], [0, *accumulate(self._key_lengths)]]

    def place(self, asked: Tensor, tokens: Tensor, query_offsets: Tensor, key_offsets: Tensor) -> None:
        """Take over `index_rows`, which are on the device now."""
        self.asked, self.tokens = asked, tokens
        self.query_offsets = Offsets(query_offsets.to(torch.int32), max(self.lengths))
        self.key_offsets = Offsets(key_offsets.to(torch.int32), max(self._key_lengths))

    @cached_property
    def asked_offsets(self) -> Offsets:
        """Offsets of one query for each sequence."""
        count = len(self.lengths)
        return Offsets(torch.arange(count + 1, dtype=torch.int32, device=self.asked.device), 1)

    @cached_property
    def _key_lengths(self) -> list[int]:
        return [self.skipped(index) + length for index, length in enumerate(self.lengths)]

    def skipped(self, sequence: int) -> int:
        """Tokens before a sequence that are known already."""
        prefix = self.prefix(sequence)
        return 0 if prefix is None else prefix.length

    def prefix(self, sequence: int) -> KeysValues | None:
        """What a sequence continues."""
        return self.prefixes[sequence] if self.prefixes else None

    def prefixed(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return those of all tokens, and before each sequence's own those of what it continues."""
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
        """The different prefixes, and for each key its place behind them and all tokens: the same for every layer.

        A few copies a layer, where slices of each sequence would be hundreds.
        """
        prefixes = list({id(prefix): prefix for prefix in self.prefixes if prefix is not None}.values())
        ends = list(accumulate(prefix.length for prefix in prefixes))
        starts = {id(prefix): end - prefix.length for prefix, end in zip(prefixes, ends, strict=True)}
        own = ends[-1] if ends else 0
        sources: list[int] = []
        for index, (length, end) in enumerate(zip(self.lengths, self.ends, strict=True)):
            if (prefix := self.prefix(index)) is not None:
                start = starts[id(prefix)]
                sources += range(start, start + prefix.length)
            sources += range(own + end - length, own + end)
        return prefixes, move(torch.tensor(sources), self.asked.device)

    def keys_values(self, sequence: int) -> KeysValues:
        """What was kept of a sequence, and of the prefix before it."""
        end = self.ends[sequence]
        start = end - self.lengths[sequence]
        prefix = self.prefix(sequence)
        layers = []
        for layer in range(len(self.kept)):
            pair = [each[:, :, start:end] for each in self.kept[layer]]
            if prefix is not None:
                pair = [torch.cat(parts, dim=2) for parts in zip(prefix.layers[layer], pair, strict=True)]
            # A copy, because a slice would keep the whole forward's.
            layers.append((pair[0].clone(), pair[1].clone()))
        return KeysValues(tuple(layers))


def choose_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Decide on a GPU's attention before the first request; nothing to do elsewhere."""
    if device.type == "cuda":
        # It makes a plan for every new combination of sizes and strides, and keeps them all.
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
    """The attention of ``[1, heads, tokens, head]``, as transformers calls it.

    Args:
        module: The attention layer, which says whether it is causal and which layer it is.
        query: Of all tokens, or of those that are asked.
        key: Of all tokens; may have fewer heads.
        value: The same.
        packing: Which tokens belong together.
        scaling: Of the scores; by default one over the root of the head's width.
        sliding_window: How far a token sees to both sides, its own position counted in; None for everything.
        one_position: Whether `query` holds only the position of each sequence that `Packing.asked` names.

    Returns:
        ``[1, queries, heads, head]``, and no weights.
    """
    if packing.keep:
        packing.kept[module.layer_idx] = (key, value)
    causal = bool(module.is_causal)
    # The kernel takes queries for the last tokens of their sequence: a first one can only be asked to see everything.
    if varlen.serves(query) and not (one_position and not packing.last and (causal or sliding_window)):
        keys, values = packing.prefixed(module.layer_idx, key, value)
        attended = varlen.attend(
            query,
            keys,
            values,
            query_offsets=packing.asked_offsets if one_position else packing.query_offsets,
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
        seen = keys.shape[2]
        rows = range(seen - length, seen) if not one_position else range(seen - 1, seen) if packing.last else range(1)
        is_causal, mask = _view(rows, seen, causal=causal, window=sliding_window, device=query.device)
        parts.append(
            functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, is_causal=is_causal, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _view(
    rows: range, seen: int, *, causal: bool, window: int | None, device: torch.device
) -> tuple[bool, Tensor | None]:
    """Which of the `seen` tokens those at `rows` look at: torch's own causal mask, or a mask, or neither for all."""
    windowed = window is not None and window < seen
    if not windowed and (not causal or rows.start == seen - 1):
        return False, None
    if not windowed and len(rows) == seen:
        return True, None
    columns = torch.arange(seen, device=device)
    row = columns[rows.start : rows.stop, None]
    mask = columns <= row if causal else torch.ones(len(rows), seen, dtype=torch.bool, device=device)
    if windowed and window is not None:
        mask = mask & ((columns - row).abs() < window)
    return False, mask


AttentionInterface.register(PACKED, packed_attention)
