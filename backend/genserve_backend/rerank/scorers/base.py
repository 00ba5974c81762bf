"""What the three kinds of reranker have in common: a text becomes sequences, sequences become rows, rows become scores.

The work is cut in this way because only the middle part needs the device, and it does not care which request a
sequence belongs to: sequences of several requests may share a forward.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.scorers.loading import load_model, load_tokenizer, pad_id


@dataclass(frozen=True)
class TokenSequence:
    """One row of a forward, before padding."""

    ids: list[int]
    """Token ids, special tokens included; never empty."""
    type_ids: list[int]
    """Which segment each token belongs to, for the models that ask."""
    truncated: bool = False
    """Whether tokens of the text were left out."""


@dataclass(frozen=True)
class Encoded:
    """What the model has to read to answer one request."""

    sequences: list[TokenSequence]
    """`leading` sequences, then one for every document in the order of the request."""
    leading: int = 0
    """Sequences in front that belong to no document."""
    query_truncated: bool = False
    """Whether the query itself was cut."""


@dataclass(frozen=True)
class Padded:
    """Sequences of different lengths as one rectangle, on the device."""

    ids: torch.Tensor
    """int64 [sequences, tokens], padded on the right."""
    type_ids: torch.Tensor
    """int64 [sequences, tokens]."""
    mask: torch.Tensor
    """bool [sequences, tokens], true at real tokens."""

    @classmethod
    def of(cls, batch: list[TokenSequence], *, pad: int, device: torch.device) -> Padded:
        """Pad `batch` (at least one sequence) to its longest with the token id `pad`."""
        lengths = [len(sequence.ids) for sequence in batch]
        width = max(lengths)
        ids = torch.tensor([sequence.ids + [pad] * (width - len(sequence.ids)) for sequence in batch])
        type_ids = torch.tensor([sequence.type_ids + [0] * (width - len(sequence.ids)) for sequence in batch])
        mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
        return cls(ids.to(device), type_ids.to(device), mask.to(device))

    def last(self, hidden: torch.Tensor) -> torch.Tensor:
        """The row of `hidden` [sequences, tokens, width] at each sequence's last real token: [sequences, width]."""
        positions = self.mask.sum(dim=1) - 1
        return hidden[torch.arange(len(positions), device=hidden.device), positions]


class Scorer(ABC):
    """A loaded reranker.

    Args:
        checkpoint: The folder to load.
        max_length: Tokens of one sequence, at most.
        dtype: The arithmetic of the weights; what decides a score after the last layer is float32 in any case.
        device: Where the model goes.

    Raises:
        CheckpointError: The folder cannot be loaded, or `max_length` leaves no room for a text.
    """

    model_class: ClassVar[Any]
    """The transformers Auto class that loads the model."""
    unused_weights: ClassVar[str] = ""
    """Weights with this in their name may be absent from the folder: no score depends on them."""

    def __init__(
        self, checkpoint: RerankCheckpoint, *, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.checkpoint = checkpoint
        self.max_length = max_length
        self.device = device
        self.tokenizer = load_tokenizer(checkpoint.path)
        model = load_model(self.model_class, checkpoint.path, dtype=dtype, unused_weights=self.unused_weights)
        self.pad = pad_id(model, self.tokenizer)
        self.model: Any = model.to(device)
        # The tokenizers of models without segments and the forwards of models with one both name them by accident.
        self._takes_types = (
            "token_type_ids" in self.tokenizer.model_input_names
            and "token_type_ids" in inspect.signature(model.forward).parameters
        )

    @abstractmethod
    def encode(self, request: RerankRequest, check: Callable[[], None]) -> Encoded:
        """Tokenise `request`. Runs on the CPU and calls `check` every now and then, which may raise."""

    @abstractmethod
    def rows(self, padded: Padded) -> torch.Tensor:
        """One forward of the model: float32 [sequences, width], independent of the padding."""

    @abstractmethod
    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """Turn the rows of one request, in the order of its sequences, into float32 [documents] in 0 to 1."""

    def encoder_inputs(self, padded: Padded) -> dict[str, torch.Tensor]:
        """The arguments of a model that attends in both directions, and so must be told where the padding is."""
        types = {"token_type_ids": padded.type_ids} if self._takes_types else {}
        return {"input_ids": padded.ids, "attention_mask": padded.mask.long(), **types}

    def forward(self, batch: list[TokenSequence]) -> torch.Tensor:
        """Run sequences of any requests together.

        Args:
            batch: At least one sequence.

        Returns:
            float32 [len(batch), width] on the CPU.

        Raises:
            torch.OutOfMemoryError: The batch does not fit into the device's memory.
        """
        with torch.inference_mode():
            return self.rows(Padded.of(batch, pad=self.pad, device=self.device)).float().cpu()
