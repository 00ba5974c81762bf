"""The scorer: a loaded reranker in three steps, tokenize, forward and scores.

A request becomes token sequences, sequences become outputs, and outputs become scores. Only the forward needs the
device, and sequences of several requests may share one.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

import torch
from typing_extensions import Unpack

from genserve_backend.devices import wait_for_stream
from genserve_backend.matrices import use_int8_matrices, use_packed_matrices
from genserve_backend.rerank.attention import KeysValues, Packing, choose_kernels
from genserve_backend.rerank.checkpoint import RerankCheckpoint, first_position
from genserve_backend.rerank.packing import can_pack, compile_model, prepare_packing
from genserve_backend.rerank.prefix import PrefixCache
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.scorers.layouts import Layout, Packed, Padded, TokenSequence
from genserve_backend.rerank.scorers.pretrained import load_model, load_tokenizer, pad_id
from genserve_backend.rerank.sentence_transformers import Pooling


@dataclass(frozen=True)
class Slice:
    """The sequences of some of a request's documents."""

    sequences: list[TokenSequence]
    """In the order of the documents, after the query if that has a sequence of its own."""
    characters: int
    """Characters of the documents that they were made from."""
    query_truncated: bool = False
    """True if the query itself was cut."""


class Placement(TypedDict):
    """The device of a model and its arithmetic."""

    dtype: torch.dtype
    """Dtype of the weights. What follows the last layer is float32 in any case."""
    int8: bool
    """True if matrix products are in int8 instead."""
    compiled: bool
    """True if the model is compiled with torch.compile."""
    device: torch.device
    prefix_cache_bytes: int
    """Device memory of the prefix cache; 0 disables it."""


class Scorer(ABC):
    """A loaded reranker, independent of the library that runs its model."""

    packs: bool
    """True if forwards are packed, without padding."""

    @property
    def prefix_tokens_computed(self) -> int:
        """Tokens computed for shared prefixes so far, in addition to the sequences' own."""
        return 0

    @property
    def prefix_tokens_reused(self) -> int:
        """Tokens of the sequences so far that a cache of the model's library had already computed."""
        return 0

    @abstractmethod
    def tokenize(self, request: RerankRequest) -> Iterator[Slice]:
        """Yield the sequences of `request`, some documents at a time. Runs on the CPU, alongside the forwards."""

    @abstractmethod
    def forward(self, batch: Sequence[TokenSequence]) -> torch.Tensor:
        """Return the outputs of sequences, which may belong to several requests.

        Args:
            batch: At least one sequence.

        Returns:
            float32 [len(batch), width] on the CPU. No output depends on another sequence.

        Raises:
            torch.OutOfMemoryError: The batch does not fit into the device's memory.
        """

    @abstractmethod
    def scores(self, outputs: torch.Tensor) -> torch.Tensor:
        """Turn the outputs of one request, in the order of its sequences, into float32 [documents] in 0 to 1."""


class TorchScorer(Scorer):
    """A reranker whose model is run by transformers and torch.

    Args:
        checkpoint: The folder to load.
        max_length: Tokens of one sequence, at most.
        placement: See `Placement`.

    Raises:
        CheckpointError: The folder cannot be loaded, or `max_length` leaves no room for a text.
    """

    causal: ClassVar[bool] = False
    """True if tokens attend only to earlier ones."""
    model_class: ClassVar[Any]
    """The transformers Auto class that loads the model."""
    unused_weights: ClassVar[str] = ""
    """Weights with this in their name may be missing from the folder: no score depends on them."""

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
        # Both are needed: some tokenizers and some forwards name token_type_ids although the other does not use them.
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
        self._prefixes = PrefixCache(max_bytes=placement["prefix_cache_bytes"], compute=self._compute_prefixes)
        """Used only by causal models."""

    @property
    @abstractmethod
    def pooling(self) -> Pooling:
        """The way that the hidden states of a sequence's tokens become its output."""

    @abstractmethod
    def outputs(self, layout: Layout, inputs: dict[str, Any]) -> torch.Tensor:
        """Run the model and return the outputs, [sequences, width]."""

    def forward(self, batch: Sequence[TokenSequence]) -> torch.Tensor:
        """Return the outputs of sequences, packed if the model supports it."""
        with torch.inference_mode():
            layout = self._lay_out(batch)
            types = {"token_type_ids": layout.type_ids} if self._takes_types else {}
            outputs = self.outputs(layout, layout.inputs | types).float()
            wait_for_stream(self.device)
            return outputs.cpu()

    def warm_up(self, tokens: int) -> None:
        """Run forwards of one and of several sequences, up to `tokens` tokens: compilation then delays no request."""
        for lengths in ((tokens // 8,), (2, 3), (tokens // 2, tokens // 4, tokens // 8)):
            sequences = [[self.pad] * max(2, min(length, self.max_length)) for length in lengths]
            self.forward([TokenSequence(ids, [0] * len(ids), None) for ids in sequences])

    @property
    def prefix_tokens_computed(self) -> int:
        """Tokens computed for shared prefixes so far, in addition to the sequences' own."""
        return self._prefixes.computed_tokens

    @property
    def _one_position(self) -> bool:
        return self.pooling in ("cls", "lasttoken")

    def _lay_out(self, batch: Sequence[TokenSequence]) -> Layout:
        if not self.packs:
            return Padded(batch, pad=self.pad, causal=self.causal, device=self.device)
        prefixes = [sequence.prefix for sequence in batch]
        cached = self._prefixes.get(prefix for prefix in prefixes if prefix)
        return self._pack(batch, [cached[prefix.ids] if prefix else None for prefix in prefixes])

    def _pack(
        self, batch: Sequence[TokenSequence], prefixes: Sequence[KeysValues | None], *, capture: bool = False
    ) -> Packed:
        lengths = [sequence.length for sequence in batch]
        return Packed(
            batch,
            Packing(lengths, last=self.pooling == "lasttoken", prefixes=prefixes, capture=capture),
            first_position=first_position(self.model.config),
            one_position=self._one_position,
            device=self.device,
        )

    def _compute_prefixes(self, texts: Sequence[list[int]], prefixes: Sequence[KeysValues | None]) -> list[KeysValues]:
        """Return the keys and values of token ids, preceded by those of the prefixes that they continue."""
        layout = self._pack([TokenSequence(ids, [], None) for ids in texts], prefixes, capture=True)
        self.outputs(layout, layout.inputs)
        return [layout.packing.keys_values(index) for index in range(len(texts))]
