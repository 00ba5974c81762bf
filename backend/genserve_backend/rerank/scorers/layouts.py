"""How sequences of different lengths become the tensors of one forward, and what is read off its hidden states.

Packed: all tokens in one row, nothing wasted, for the models whose attention can be told which of them belong together.
Padded: one row for each sequence, filled up to the longest, for all others.
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
from genserve_backend.rerank.sentence import Pooling


@dataclass(frozen=True)
class TokenSequence:
    """One sequence of a forward."""

    ids: list[int]
    """Token ids, special tokens included; never empty."""
    type_ids: list[int]
    """Which segment each token belongs to, for the models that ask."""
    document: int | None
    """The index of the document that it reads; None for a query by itself."""
    truncated: bool = False
    """Whether tokens of the text were left out."""
    prefix: Prefix | None = None
    """What `ids` begins with, if that is shared by other sequences and shorter."""

    @property
    def new_ids(self) -> list[int]:
        """The tokens that a forward has to read."""
        return self.ids[len(self.prefix.ids) :] if self.prefix else self.ids

    @property
    def length(self) -> int:
        """How many they are."""
        return len(self.ids) - (len(self.prefix.ids) if self.prefix else 0)

    @property
    def name(self) -> str:
        """What its caller calls it."""
        return "QUERY" if self.document is None else f"DOCUMENTS[{self.document}]"


class Layout(Protocol):
    """Sequences as tensors on the device."""

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments of a model's forward, but for segments."""

    @property
    def type_ids(self) -> Tensor:
        """The segments, in the shape of the token ids."""

    def pool(self, hidden: Tensor, mode: Pooling) -> Tensor:
        """One row ``[sequences, width]`` out of the last hidden states."""


class Padded:
    """A rectangle, padded on the right.

    Args:
        batch: At least one sequence.
        pad: The token id to pad with.
        causal: Whether no token looks at those behind it: then nothing has to be said about the padding, and torch may
            use its faster causal kernels.
        device: Where the tensors go.
    """

    def __init__(self, batch: Sequence[TokenSequence], *, pad: int, causal: bool, device: torch.device) -> None:
        lengths = [len(sequence.ids) for sequence in batch]
        width = max(lengths)
        ids = _rectangle([sequence.ids for sequence in batch], width, pad)
        type_ids = _rectangle([sequence.type_ids for sequence in batch], width, 0)
        self._lengths, *rectangles = copy_together([lengths, ids, type_ids], device)
        self._ids, self.type_ids = (each.view(len(batch), width) for each in rectangles)
        self._mask = torch.arange(width, device=device) < self._lengths.unsqueeze(1)
        self._causal = causal

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments of a model's forward, but for segments."""
        return {"input_ids": self._ids} | ({} if self._causal else {"attention_mask": self._mask.long()})

    def pool(self, hidden: Tensor, mode: Pooling) -> Tensor:
        """One row ``[sequences, width]`` out of ``[sequences, tokens, width]``."""
        if mode == "cls":
            return hidden[:, 0]
        if mode == "lasttoken":
            return hidden[torch.arange(len(hidden), device=hidden.device), self._lengths - 1]
        outside = ~self._mask.unsqueeze(-1)
        if mode == "max":
            return hidden.masked_fill(outside, float("-inf")).amax(dim=1)
        return hidden.masked_fill(outside, 0).sum(dim=1) / self._lengths.unsqueeze(1)


class Packed:
    """One row of all tokens, for a model that `prepare_packing` has seen.

    Args:
        batch: At least one sequence.
        packing: Their lengths.
        first_position: The position of a sequence's first token.
        one_position: Whether the model's last layer answers for one position of each sequence alone.
        device: Where the tensors go.
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
        # A model with segments is not causal: it has no prefixes.
        type_ids = list(chain.from_iterable(sequence.type_ids for sequence in batch))
        positions = chain.from_iterable(
            range(first_position + packing.skipped(index), first_position + packing.skipped(index) + length)
            for index, length in enumerate(packing.lengths)
        )
        moved = copy_together([ids, type_ids, list(positions), *packing.index_rows], device)
        self._ids, self.type_ids, self._positions = (each[None] for each in moved[:3])
        packing.place(*moved[3:])
        self.packing = packing
        self._one_position = one_position

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments of a model's forward, but for segments."""
        return {"input_ids": self._ids, "position_ids": self._positions, "packing": self.packing}

    def pool(self, hidden: Tensor, mode: Pooling) -> Tensor:
        """One row ``[sequences, width]`` out of ``[1, tokens, width]``, or of ``[sequences, 1, width]``."""
        if self._one_position:
            return hidden[:, 0]
        # Unsafe is without a check of the lengths, for which a GPU would be waited for.
        reduce = "mean" if mode == "mean" else "max"
        return torch.segment_reduce(hidden[0], reduce, lengths=self.packing.tokens, unsafe=True)


def _rectangle(rows: Sequence[list[int]], width: int, filler: int) -> list[int]:
    """Return the rows filled up to `width`, one after another."""
    return list(chain.from_iterable(row + [filler] * (width - len(row)) for row in rows))
