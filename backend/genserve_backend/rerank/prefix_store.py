"""The keys and values of cached prefixes on the device, and their way into the attention of a forward.

All are rows of one tensor: first the slots of each layer, then the tokens of the current forward. One index per layer
then gathers the keys and values of all sequences, whether their prefix is cached or computed by the same forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genserve_backend.rerank.prefix import Entry, Plan

LEAST_ROOM = 1024
"""Tokens of a forward that there is room for from the start."""


@dataclass(frozen=True)
class Shape:
    """The keys and values of one token: ``layers`` times ``[2, heads, width]`` of ``dtype``."""

    layers: int
    heads: int
    width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype) -> Shape:
        """Return the shape for a transformers config."""
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_hidden_layers, heads, width, dtype)

    @property
    def nbytes(self) -> int:
        """Memory of a token."""
        return 2 * self.layers * self.heads * self.width * self.dtype.itemsize


class PrefixStore:
    """Keys and values by slot and layer, followed by those of the current forward.

    Args:
        shape: Keys and values of a token.
        slots: Tokens that can be cached.
        device: The model's device.
    """

    def __init__(self, shape: Shape, *, slots: int, device: torch.device) -> None:
        self.shape = shape
        self.slots = slots
        self.own_start = shape.layers * slots
        """The first row of the current forward."""
        self._device = device
        self._rows: Tensor | None = None
        self._used_slots = 0
        self._layers = torch.arange(shape.layers, dtype=torch.int32, device=device)[:, None]

    def reserve(self, tokens: int) -> None:
        """Make room for a forward of `tokens` tokens, besides the slots.

        Raises:
            torch.OutOfMemoryError: There is no memory for it; what is stored stays.
        """
        before = self._rows
        if before is not None and before.shape[0] - self.own_start >= tokens:
            return
        room = max(LEAST_ROOM, 1 << (tokens - 1).bit_length())  # a power of two, so that it grows only a few times
        size = (self.own_start + room, 2, self.shape.heads, self.shape.width)
        self._rows = torch.empty(size, dtype=self.shape.dtype, device=self._device)
        if before is not None:
            self._cached(self._rows).copy_(self._cached(before))

    def _cached(self, rows: Tensor) -> Tensor:
        """Return the slots of all layers up to the last one that was ever used: on a CPU, the others take no memory."""
        shape = self.shape
        by_layer = rows[: self.own_start].view(shape.layers, self.slots, 2, shape.heads, shape.width)
        return by_layer[:, : self._used_slots]

    def use(self, slots: NDArray[np.int32]) -> None:
        """Note that these slots are going to be written."""
        self._used_slots = max(self._used_slots, int(slots.max(initial=-1)) + 1)

    def place(self, plan: Plan, lengths: Sequence[int]) -> PlacedPrefixes | None:
        """Return the rows of the keys of each sequence; None if no sequence has a prefix.

        Args:
            plan: The prefixes of the sequences.
            lengths: Tokens of the sequences, followed by those of `Plan.missing`.
        """
        if not any(plan.entries):
            return None
        return PlacedPrefixes(self, plan, lengths)

    def rows(self, base: Tensor, step: Tensor) -> Tensor:
        """Return ``base + layer * step`` for all layers, ``[layers, len(base)]``."""
        return torch.addcmul(base, self._layers, step)

    @property
    def all(self) -> Tensor:
        """All rows, ``[rows, 2, heads, width]``; valid after `reserve`, until the next one."""
        if self._rows is None:
            raise RuntimeError("no forward has reserved its rows")
        return self._rows


class PlacedPrefixes:
    """The rows of all keys of a forward, on the host.

    Args:
        store: Where the keys and values are.
        plan: The prefixes of the sequences.
        lengths: Tokens of the sequences, followed by those of `Plan.missing`.
    """

    def __init__(self, store: PrefixStore, plan: Plan, lengths: Sequence[int]) -> None:
        self._store = store
        self.tokens = sum(lengths)
        ends = np.cumsum(lengths)
        own = np.arange(store.own_start, store.own_start + self.tokens, dtype=np.int32)
        of_sequence = [own[end - length : end] for length, end in zip(lengths, ends, strict=True)]
        count = len(plan.entries)
        computed = dict(zip(map(id, plan.missing), of_sequence[count:], strict=True))
        whole: dict[int, NDArray[np.int32]] = {}

        def before(entry: Entry | None) -> NDArray[np.int32]:
            """Return the rows of a prefix, in layer 0 if they are cached."""
            if entry is None:
                return own[:0]
            if id(entry) not in whole:
                parts = [computed[id(each)] if id(each) in computed else _slots(each) for each in entry.chain]
                whole[id(entry)] = np.concatenate(parts)
            return whole[id(entry)]

        prefixes = [before(entry) for entry in (*plan.entries, *(entry.parent for entry in plan.missing))]
        self.prefix_lengths = [len(prefix) for prefix in prefixes]
        """Tokens of the prefix of each sequence."""
        self._base = np.concatenate([rows for pair in zip(prefixes, of_sequence, strict=True) for rows in pair])
        stored = [entry for entry in plan.missing if entry.slots is not None]
        self._first_stored = int(ends[count - 1])
        """The first token whose keys and values are to be kept; these are consecutive."""
        self._stored = np.concatenate([own[:0], *map(_slots, stored)])

    @property
    def index_arrays(self) -> list[NDArray[np.int32]]:
        """The arguments of `on_device`, to be copied to the device."""
        return [
            self._base,
            np.where(self._base < self._store.own_start, self._store.slots, 0).astype(np.int32),
            self._stored,
            np.full(len(self._stored), self._store.slots, dtype=np.int32),
        ]

    def on_device(self, base: Tensor, step: Tensor, stored: Tensor, stored_step: Tensor) -> PrefixRows:
        """Return the rows on the device, from `index_arrays` there.

        Raises:
            torch.OutOfMemoryError: The forward's tokens do not fit.
        """
        self._store.reserve(self.tokens)
        self._store.use(self._stored)
        kept = self._store.rows(stored, stored_step).long() if len(self._stored) else None  # for index_copy_
        first = self._first_stored
        return PrefixRows(
            self._store.all,
            own=slice(self._store.own_start, self._store.own_start + self.tokens),
            keys=self._store.rows(base, step),
            kept=kept,
            kept_from=slice(self._store.own_start + first, self._store.own_start + first + len(self._stored)),
        )


@dataclass(frozen=True)
class PrefixRows:
    """The keys and values of a forward, those of its prefixes included.

    Attributes:
        all: ``[rows, 2, heads, width]``: keys and values of the cached tokens and of the forward's own.
        own: Rows of the forward's own tokens.
        keys: int32 ``[layers, keys]``: the row of each key.
        kept: int64 ``[layers, tokens]``: the rows of the new prefixes' tokens in the cache; None if there are none.
        kept_from: The same tokens among the forward's own rows.
    """

    all: Tensor = field(repr=False)
    own: slice
    keys: Tensor = field(repr=False)
    kept: Tensor | None = field(repr=False)
    kept_from: slice

    @property
    def own_rows(self) -> Tensor:
        """The keys and values of the forward's own tokens, ``[tokens, 2, heads, width]``, to be written."""
        return self.all[self.own]

    def with_prefixes(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all tokens, each sequence's preceded by those of its prefix.

        Args:
            layer: Index of the layer.
            key: Keys of the forward's own tokens, ``[1, heads, tokens, width]``.
            value: The same.
        """
        own = self.own_rows
        own[:, 0] = key[0].transpose(0, 1)
        own[:, 1] = value[0].transpose(0, 1)
        gathered = self.gather(layer)
        return gathered[:, 0].transpose(0, 1)[None], gathered[:, 1].transpose(0, 1)[None]

    def gather(self, layer: int) -> Tensor:
        """Return ``[keys, 2, heads, width]`` after the forward's own rows have been written; keep new prefixes."""
        if self.kept is not None:
            cached = self.all[: self.own.start]  # torch wants a target apart from the source
            cached.index_copy_(0, self.kept[layer], self.all[self.kept_from])
        return self.all.index_select(0, self.keys[layer])


def _slots(entry: Entry) -> NDArray[np.int32]:
    if entry.slots is None:
        raise RuntimeError("a prefix is neither cached nor computed by this forward")
    return entry.slots
