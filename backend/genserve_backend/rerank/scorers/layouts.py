"""Batch layouts: the input tensors for sequences of different lengths, and the pooling of their hidden states.

Packed: all tokens in one batch row without padding, for models that `packing` supports.
Padded: one batch row per sequence, padded to the longest, for all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genserve_backend.devices import copy_arrays
from genserve_backend.rerank.attention import Packing
from genserve_backend.rerank.prefix import Plan, Prefix
from genserve_backend.rerank.prefix_store import PlacedPrefixes
from genserve_backend.rerank.sentence_transformers import Pooling


@dataclass(frozen=True)
class TokenSequence:
    """A sequence of token ids, the unit of a forward."""

    ids: list[int]
    """Token ids, including special tokens; never empty."""
    type_ids: list[int]
    """The segment of each token, for models with segments; empty if all are 0."""
    document: int | None
    """The index of its document; None for the query alone."""
    truncated: bool = False
    """True if tokens of the document were cut off."""
    prefix: Prefix | None = None
    """A shorter beginning of `ids` that other sequences share."""

    new_ids: NDArray[np.int32] = field(init=False, repr=False, compare=False)
    """int32: the tokens after the prefix, which a forward computes. The thread that tokenizes makes this array."""

    def __post_init__(self) -> None:
        start = len(self.prefix.ids) if self.prefix else 0
        object.__setattr__(self, "new_ids", np.array(self.ids[start:], dtype=np.int32))

    @property
    def length(self) -> int:
        """The number of `new_ids`."""
        return len(self.new_ids)

    @property
    def name(self) -> str:
        """Its tensor in the request, for errors."""
        return "QUERY" if self.document is None else f"DOCUMENTS[{self.document}]"


class Layout(Protocol):
    """The sequences of a forward as tensors on the device."""

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments of the model's forward, without segments."""

    @property
    def type_ids(self) -> Tensor:
        """Segments, in the shape of the token ids."""

    def pool(self, hidden: Tensor, mode: Pooling) -> Tensor:
        """Pool the last hidden states to ``[sequences, width]``."""


class Padded:
    """One batch row per sequence, padded on the right.

    Args:
        batch: At least one sequence.
        pad: The token id to pad with.
        causal: Whether tokens attend only to earlier ones. Then the padding needs no mask, and torch can use its faster
            causal kernels.
        device: The model's device.
    """

    def __init__(self, batch: Sequence[TokenSequence], *, pad: int, causal: bool, device: torch.device) -> None:
        lengths = [len(sequence.ids) for sequence in batch]
        width = max(lengths)
        ids = _pad([sequence.ids for sequence in batch], width, pad)
        type_ids = _pad([sequence.type_ids for sequence in batch], width, 0)
        moved = copy_arrays([np.array(lengths, dtype=np.int32), ids, type_ids], device)
        # Some of transformers' models accept no other indices than int64.
        self._lengths, *padded = (each.long() for each in moved)
        self._ids, self.type_ids = (each.view(len(batch), width) for each in padded)
        self._mask = torch.arange(width, device=device) < self._lengths.unsqueeze(1)
        self._causal = causal

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments of the model's forward, without segments."""
        return {"input_ids": self._ids} | ({} if self._causal else {"attention_mask": self._mask.long()})

    def pool(self, hidden: Tensor, mode: Pooling) -> Tensor:
        """Pool ``[sequences, tokens, width]`` to ``[sequences, width]``."""
        if mode == "cls":
            return hidden[:, 0]
        if mode == "lasttoken":
            return hidden[torch.arange(len(hidden), device=hidden.device), self._lengths - 1]
        padding = ~self._mask.unsqueeze(-1)
        if mode == "max":
            return hidden.masked_fill(padding, float("-inf")).amax(dim=1)
        return hidden.masked_fill(padding, 0).sum(dim=1) / self._lengths.unsqueeze(1)


class Packed:
    """All tokens in one batch row, for a model that `prepare_packing` has prepared.

    The tokens of missing prefixes follow those of the sequences.

    Args:
        batch: At least one sequence.
        last: Whether the output position of a sequence is its last token; otherwise it is the first.
        plan: The prefixes of the sequences, and those that the forward has to compute.
        placed: Their places; None if no sequence has a prefix.
        first_position: The position of a sequence's first token.
        one_position: Whether the model's last layer computes only one position of each sequence.
        types: Whether the model has segments.
        device: The model's device.
    """

    def __init__(
        self,
        batch: Sequence[TokenSequence],
        *,
        last: bool,
        plan: Plan,
        placed: PlacedPrefixes | None,
        first_position: int,
        one_position: bool,
        types: bool,
        device: torch.device,
    ) -> None:
        new_ids = packed_ids(batch, plan)
        lengths = [len(ids) for ids in new_ids]
        before = placed.prefix_lengths if placed else [0] * len(lengths)
        packing = Packing(lengths, last=last, key_lengths=[sum(pair) for pair in zip(before, lengths, strict=True)])
        # Only causal models have prefixes, and they have no segments.
        type_ids = [_types(sequence) for sequence in batch] if types else [_NONE]
        positions = [
            np.arange(first_position + start, first_position + start + length, dtype=np.int32)
            for start, length in zip(before, lengths, strict=True)
        ]
        host = [np.concatenate(each) for each in (new_ids, type_ids, positions)]
        host += packing.index_arrays
        moved = copy_arrays([*host, *(placed.index_arrays if placed else [])], device)
        self._ids, self.type_ids, self._positions = (each[None] for each in moved[:3])
        packing.set_indices(*moved[3 : len(host)])
        if placed:
            packing.prefix_rows = placed.on_device(*moved[len(host) :])
        self.packing = packing
        self._one_position = one_position

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments of the model's forward, without segments."""
        # BERT gathers by position, which takes int64 alone.
        return {"input_ids": self._ids, "position_ids": self._positions.long(), "packing": self.packing}

    def pool(self, hidden: Tensor, mode: Pooling) -> Tensor:
        """Pool ``[1, tokens, width]``, or ``[sequences, 1, width]``, to ``[sequences, width]``."""
        if self._one_position:
            return hidden[:, 0]
        # unsafe skips a check of the lengths that would wait for the GPU.
        reduce = "mean" if mode == "mean" else "max"
        return torch.segment_reduce(hidden[0], reduce, lengths=self.packing.tokens, unsafe=True)


def packed_ids(batch: Sequence[TokenSequence], plan: Plan) -> list[NDArray[np.int32]]:
    """Return the tokens that a packed forward computes: those of the sequences, then those of missing prefixes."""
    return [*(sequence.new_ids for sequence in batch), *(entry.prefix.new_ids for entry in plan.missing)]


def _types(sequence: TokenSequence) -> NDArray[np.int32]:
    if not sequence.type_ids:
        return np.zeros(len(sequence.ids), dtype=np.int32)
    return np.array(sequence.type_ids, dtype=np.int32)


def _pad(sequences: Sequence[list[int]], width: int, filler: int) -> NDArray[np.int32]:
    """Return the sequences padded to `width`, one after another."""
    padded = np.full((len(sequences), width), filler, dtype=np.int32)
    for row, ids in zip(padded, sequences, strict=True):
        row[: len(ids)] = ids
    return padded.reshape(-1)


_NONE = np.zeros(0, dtype=np.int32)
