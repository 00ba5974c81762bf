"""The scorer: a loaded reranker in three steps, tokenize, forward and scores.

A request becomes token sequences, sequences become outputs, and outputs become scores. Only the forward needs the
device, and sequences of several requests may share one.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar, TypedDict

import torch
from typing_extensions import Unpack

from genserve_backend.devices import copy_back
from genserve_backend.matrices import use_int8_matrices, use_packed_matrices
from genserve_backend.rerank.attention import choose_kernels
from genserve_backend.rerank.checkpoint import RerankCheckpoint, first_position
from genserve_backend.rerank.decoder import can_fuse
from genserve_backend.rerank.packing import can_pack, compile_model, prepare_packing, uncompile_model
from genserve_backend.rerank.prefix import Plan, Prefix, PrefixCache
from genserve_backend.rerank.prefix_store import PrefixStore, Shape
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.scorers.layouts import Layout, Packed, Padded, TokenSequence, packed_ids
from genserve_backend.rerank.scorers.pending import Pending
from genserve_backend.rerank.scorers.pretrained import load_model, load_tokenizer, pad_id
from genserve_backend.rerank.sentence_transformers import Pooling

PROBED_PREFIX = 3
"""Tokens of a prefix with which the forwards are warmed up."""


@dataclass(frozen=True)
class Slice:
    """The sequences of some of a request's documents."""

    sequences: list[TokenSequence]
    """In the order of the documents, after the query if that has a sequence of its own."""
    characters: int
    """Characters of the documents that they were made from."""
    query_truncated: bool = False
    """True if the query itself was cut."""


class PrefixLost(RuntimeError):
    """A forward used a prefix that an earlier one failed to compute."""


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

    def launch(self, batch: Sequence[TokenSequence]) -> Pending:
        """Start `forward` and return its result, which a device may still be working on.

        Raises:
            torch.OutOfMemoryError: The batch does not fit into the device's memory.
        """
        return Pending(self.forward(batch))

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
        self._first_position = first_position(self.model.config)
        self._fuses = self.packs and self.causal and can_fuse(self.model, self.device)
        """True if the subclass replaces the model by a `PackedDecoder`."""
        self.compiled = placement["compiled"]
        """True if parts of the model are compiled. See `stop_compiling`."""
        if self.packs and not self._fuses:
            prepare_packing(self.model, one_position=self._one_position)
        if self.compiled and not self._fuses:
            compile_model(self.model.base_model)
        elif placement["int8"]:
            use_int8_matrices(self.model.base_model)
        elif not self._fuses:
            use_packed_matrices(self.model.base_model)
        self._prefixes = PrefixCache(slots=0)
        self._store: PrefixStore | None = None
        if self.packs and self.causal:
            shape = Shape.of(self.model.config, dtype)
            slots = placement["prefix_cache_bytes"] // shape.nbytes
            self._prefixes = PrefixCache(slots=slots)
            self._store = PrefixStore(shape, slots=slots, device=self.device)

    @property
    @abstractmethod
    def pooling(self) -> Pooling:
        """The way that the hidden states of a sequence's tokens become its output."""

    @abstractmethod
    def outputs(self, layout: Layout, inputs: dict[str, Any]) -> torch.Tensor:
        """Run the model and return the outputs, [sequences, width]."""

    def forward(self, batch: Sequence[TokenSequence]) -> torch.Tensor:
        """Return the outputs of sequences, packed if the model supports it."""
        return self.launch(batch).outputs()

    def launch(self, batch: Sequence[TokenSequence]) -> Pending:
        """Queue a forward on the device. Nothing in it waits for a value."""
        plan = self._prefixes.plan([sequence.prefix for sequence in batch] if self.packs else [])
        try:
            with torch.inference_mode():
                layout = self._lay_out(batch, plan)
                types = {"token_type_ids": layout.type_ids} if self._takes_types else {}
                # The outputs of missing prefixes come last.
                outputs, event = copy_back(self.outputs(layout, layout.inputs | types)[: len(batch)].float())
        except BaseException:
            self._prefixes.drop(plan)
            raise
        return _PendingForward(outputs, event, prefixes=self._prefixes, plan=plan)

    def warm_up(self, tokens: int) -> None:
        """Run forwards of one and of several sequences, up to `tokens` tokens: compilation then delays no request.

        The sizes differ, so that torch learns which vary, and with them the forwards repeat, with and without a prefix.
        """
        prefixes = (None, Prefix((self.pad,) * PROBED_PREFIX)) if self._store else (None,)
        for prefix, lengths in product(
            prefixes, ((tokens // 8,), (2, 3), (tokens // 2, tokens // 4, tokens // 8), (tokens // 16,))
        ):
            before = len(prefix.ids) if prefix else 0
            sequences = [[self.pad] * (before + max(2, min(length, self.max_length - before))) for length in lengths]
            self.forward([TokenSequence(ids, [], None, prefix=prefix) for ids in sequences])

    def stop_compiling(self) -> None:
        """Run the model without torch.compile from now on."""
        self.compiled = False
        uncompile_model(self.model.base_model)

    @property
    def prefix_tokens_computed(self) -> int:
        """Tokens computed for shared prefixes so far, in addition to the sequences' own."""
        return self._prefixes.computed_tokens

    @property
    def _one_position(self) -> bool:
        return self.pooling in ("cls", "lasttoken")

    def _lay_out(self, batch: Sequence[TokenSequence], plan: Plan) -> Layout:
        if not self.packs:
            return Padded(batch, pad=self.pad, causal=self.causal, device=self.device)
        lengths = list(map(len, packed_ids(batch, plan)))
        return Packed(
            batch,
            last=self.pooling == "lasttoken",
            plan=plan,
            placed=self._store.place(plan, lengths) if self._store else None,
            first_position=self._first_position,
            one_position=self._one_position,
            types=self._takes_types,
            device=self.device,
        )


class _PendingForward(Pending):
    """The outputs of a `TorchScorer`, which depend on the forward that has computed their prefixes."""

    def __init__(
        self, outputs: torch.Tensor, event: torch.cuda.Event | None, *, prefixes: PrefixCache, plan: Plan
    ) -> None:
        super().__init__(outputs, event)
        self._prefixes = prefixes
        self._plan = plan

    def outputs(self) -> torch.Tensor:
        """Wait for the outputs. If the forward has failed, forget the prefixes that it was to compute."""
        try:
            found = super().outputs()
            if self._plan.has_lost:
                raise PrefixLost("the forward that was to compute a prefix has failed")
        except BaseException:
            self._prefixes.drop(self._plan)
            raise
        return found
