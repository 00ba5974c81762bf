"""What the three kinds of reranker have in common: a text becomes sequences, sequences become rows, rows become scores.

The work is cut in this way because only the middle part needs the device, and it does not care which request a
sequence belongs to: sequences of several requests may share a forward.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

import torch
from typing_extensions import Unpack

from genserve_backend.devices import finish
from genserve_backend.matrices import use_int8_matrices, use_packed_matrices
from genserve_backend.rerank.attention import KeysValues, Packing, choose_kernels
from genserve_backend.rerank.checkpoint import RerankCheckpoint, first_position
from genserve_backend.rerank.packing import can_pack, compile_model, prepare_packing
from genserve_backend.rerank.prefix import PrefixCache
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.scorers.layouts import Layout, Packed, Padded, TokenSequence
from genserve_backend.rerank.scorers.loading import load_model, load_tokenizer, pad_id
from genserve_backend.rerank.sentence import Pooling


@dataclass(frozen=True)
class Slice:
    """A part of what the model has to read to answer one request."""

    sequences: list[TokenSequence]
    """Document after document; before them, where a query is read by itself, the query."""
    characters: int
    """How many characters of documents they were made of."""
    query_truncated: bool = False
    """Whether the query itself was cut."""


class Placement(TypedDict):
    """Where and how the model is held."""

    dtype: torch.dtype
    """The arithmetic of the weights; what decides a score after the last layer is float32 in any case."""
    int8: bool
    """Whether products of matrices are in int8 instead."""
    compiled: bool
    """Whether torch.compile gets the model."""
    device: torch.device
    prefix_cache_bytes: int
    """Device memory for what prompts have in common; 0 turns that off."""


class Scorer(ABC):
    """A loaded reranker, as the engine knows it, whatever runs its model."""

    packs: bool
    """Whether forwards are packed, without padding."""

    @property
    @abstractmethod
    def prefix_tokens_read(self) -> int:
        """Tokens that forwards have read for prefixes so far."""

    @abstractmethod
    def read(self, request: RerankRequest) -> Iterator[Slice]:
        """Tokenise `request`, some documents at a time. Runs on the CPU, beside the forwards."""

    @abstractmethod
    def forward(self, batch: Sequence[TokenSequence]) -> torch.Tensor:
        """Run sequences of any requests together.

        Args:
            batch: At least one sequence.

        Returns:
            float32 [len(batch), width] on the CPU.

        Raises:
            torch.OutOfMemoryError: The batch does not fit into the device's memory.
        """

    @abstractmethod
    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """Turn the rows of one request, in the order of its sequences, into float32 [documents] in 0 to 1."""


class TorchScorer(Scorer):
    """A reranker that torch runs, with a model of transformers.

    Args:
        checkpoint: The folder to load.
        max_length: Tokens of one sequence, at most.
        placement: See `Placement`.

    Raises:
        CheckpointError: The folder cannot be loaded, or `max_length` leaves no room for a text.
    """

    causal: ClassVar[bool] = False
    """Whether no token looks at those behind it."""
    model_class: ClassVar[Any]
    """The transformers Auto class that loads the model."""
    unused_weights: ClassVar[str] = ""
    """Weights with this in their name may be absent from the folder: no score depends on them."""

    def __init__(self, checkpoint: RerankCheckpoint, *, max_length: int, **placement: Unpack[Placement]) -> None:
        self.checkpoint = checkpoint
        self.max_length = max_length
        self.device = placement["device"]
        self.tokenizer = load_tokenizer(checkpoint.path)
        dtype = placement["dtype"]
        self.model: Any = load_model(
            self.model_class, checkpoint.path, dtype=dtype, device=self.device, unused_weights=self.unused_weights
        )
        self.pad = pad_id(self.model, self.tokenizer)
        # The tokenizers of models without segments and the forwards of models with one both name them by accident.
        self._takes_types = (
            "token_type_ids" in self.tokenizer.model_input_names
            and "token_type_ids" in inspect.signature(self.model.forward).parameters
        )
        self.packs = can_pack(self.model)
        choose_kernels(self.device, dtype)
        if self.packs:
            prepare_packing(self.model, one_position=self._one_position)
        if placement["compiled"]:
            compile_model(self.model.base_model)
        elif placement["int8"]:
            use_int8_matrices(self.model.base_model)
        else:
            use_packed_matrices(self.model.base_model)
        self._prefixes = PrefixCache(max_bytes=placement["prefix_cache_bytes"], compute=self._read_prefixes)
        """Used by causal models alone."""

    @property
    @abstractmethod
    def pooling(self) -> Pooling:
        """Which of a sequence's tokens its row is made of."""

    @abstractmethod
    def rows(self, layout: Layout, inputs: dict[str, Any]) -> torch.Tensor:
        """One forward of the model: [sequences, width], which depends on no sequence but its own."""

    def forward(self, batch: Sequence[TokenSequence]) -> torch.Tensor:
        """One forward, packed where the model can be."""
        with torch.inference_mode():
            layout = self._lay_out(batch)
            types = {"token_type_ids": layout.type_ids} if self._takes_types else {}
            rows = self.rows(layout, layout.inputs | types).float()
            finish(self.device)
            return rows.cpu()

    def warm_up(self, tokens: int) -> None:
        """Run forwards of one and of several sequences, up to so many tokens: no request then waits for a compiler."""
        for lengths in ((tokens // 8,), (2, 3), (tokens // 2, tokens // 4, tokens // 8)):
            sequences = [[self.pad] * max(2, min(length, self.max_length)) for length in lengths]
            self.forward([TokenSequence(ids, [0] * len(ids), None) for ids in sequences])

    @property
    def prefix_tokens_read(self) -> int:
        """Tokens that forwards have read for prefixes so far."""
        return self._prefixes.computed_tokens

    @property
    def _one_position(self) -> bool:
        return self.pooling in ("cls", "lasttoken")

    def _lay_out(self, batch: Sequence[TokenSequence]) -> Layout:
        if not self.packs:
            return Padded(batch, pad=self.pad, causal=self.causal, device=self.device)
        prefixes = [sequence.prefix for sequence in batch]
        known = self._prefixes.get(prefix for prefix in prefixes if prefix)
        return self._pack(batch, [known[prefix.ids] if prefix else None for prefix in prefixes])

    def _pack(
        self, batch: Sequence[TokenSequence], prefixes: Sequence[KeysValues | None], *, keep: bool = False
    ) -> Packed:
        lengths = [sequence.length for sequence in batch]
        return Packed(
            batch,
            Packing(lengths, last=self.pooling == "lasttoken", prefixes=prefixes, keep=keep),
            first_position=first_position(self.model.config),
            one_position=self._one_position,
            device=self.device,
        )

    def _read_prefixes(self, texts: Sequence[list[int]], prefixes: Sequence[KeysValues | None]) -> list[KeysValues]:
        """The keys and values of token ids that continue what is known already, and of that."""
        layout = self._pack([TokenSequence(ids, [], None) for ids in texts], prefixes, keep=True)
        self.rows(layout, layout.inputs)
        return [layout.packing.keys_values(index) for index in range(len(texts))]
