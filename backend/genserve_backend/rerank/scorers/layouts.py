"""Batch layouts: the input tensors for sequences of different lengths, and the pooling of their hidden states.

Packed: all tokens in one batch row without padding, for models that `packing` supports.
Padded: one batch row per sequence, padded to the longest, for all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from genserve_backend.devices import copy_together
from genserve_backend.rerank.attention import Packing
from genserve_backend.rerank.prefix import Prefix
from genserve_backend.rerank.sentence_transformers import Pooling


@dataclass(frozen=True)
class TokenSequence:
    """A sequence of token ids, the unit of a forward."""

    ids: list[int]
    """Token ids, including special tokens; never empty."""
    type_ids: list[int]
    """The segment of each token, for models with segments."""
    document: int | None
    """The index of its document; None for the query alone."""
    truncated: bool = False
    """True if tokens of the document were cut off."""
    prefix: Prefix | None = None
    """A shorter beginning of `ids` that other sequences share."""

    @property
    def new_ids(self) -> list[int]:
        """The tokens after the prefix, which a forward computes."""
        return self.ids[len(self.prefix.ids) :] if self.prefix else self.ids

    @property
    def length(self) -> int:
        """The number of `new_ids`."""
        return len(self.ids) - (len(self.prefix.ids) if self.prefix else 0)

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
        self._lengths, *padded = copy_together([lengths, ids, type_ids], device)
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

    Args:
        batch: At least one sequence.
        packing: The boundaries of the sequences.
        first_position: The position of a sequence's first token.
        one_position: Whether the model's last layer computes only one position of each sequence.
        device: The model's device.
    """

    def __init__(
        self,
        batch: Sequence[TokenSequence],
        packing: Packing,
        *,
        first_position: int,
        one_position: bool,
        device: torch.device,
    ) -> None:
        ids = list(chain.from_iterable(sequence.new_ids for sequence in batch))
        # Only causal models have prefixes, and they have no segments.
        type_ids = list(chain.from_iterable(sequence.type_ids for sequence in batch))
        positions = chain.from_iterable(
            range(first_position + before, first_position + before + length)
            for before, length in zip(map(packing.prefix_length, range(len(batch))), packing.lengths, strict=True)
        )
        moved = copy_together([ids, type_ids, list(positions), *packing.index_lists], device)
        self._ids, self.type_ids, self._positions = (each[None] for each in moved[:3])
        packing.set_indices(*moved[3:])
        self.packing = packing
        self._one_position = one_position

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments of the model's forward, without segments."""
        return {"input_ids": self._ids, "position_ids": self._positions, "packing": self.packing}

    def pool(self, hidden: Tensor, mode: Pooling) -> Tensor:
        """Pool ``[1, tokens, width]``, or ``[sequences, 1, width]``, to ``[sequences, width]``."""
        if self._one_position:
            return hidden[:, 0]
        # unsafe skips a check of the lengths that would wait for the GPU.
        reduce = "mean" if mode == "mean" else "max"
        return torch.segment_reduce(hidden[0], reduce, lengths=self.packing.tokens, unsafe=True)


def _pad(sequences: Sequence[list[int]], width: int, filler: int) -> list[int]:
    """Return the sequences padded to `width`, one after another."""
    return list(chain.from_iterable(ids + [filler] * (width - len(ids)) for ids in sequences))
