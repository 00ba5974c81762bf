"""The state of a rerank request inside the engine, and of its sequences."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.score_cache import Score
from genserve_backend.rerank.scorers.layouts import TokenSequence
from genserve_backend.worker.engine import Job
from genserve_backend.worker.scheduling import effective_level

TOKENS_PER_S = 2_000
"""Tokens by which an older request may exceed a younger one and still go first, per second of age difference."""
CHARACTERS_PER_TOKEN = 4
"""Rough estimate for documents that are not tokenized yet."""


@dataclass(eq=False)
class RequestState:
    """A request from its arrival to its result. The engine's thread owns it; the tokenization thread asks `urgency`."""

    job: Job
    request: RerankRequest
    characters_left: int
    """Characters of its documents that are not tokenized yet."""
    hits: dict[int, Score] = field(default_factory=dict)
    """Cached scores, by document."""
    cache_keys: list[bytes] = field(default_factory=list)
    """Keys of the documents in `ScoreCache`; empty if it is disabled."""
    is_tokenized: bool = False
    """True if all of its sequences have arrived."""
    query_truncated: bool = False

    sequences: list[TokenSequence] = field(default_factory=list)
    outputs: list[torch.Tensor | None] = field(default_factory=list)
    """The scorer's output for each sequence; None until its forward."""
    waiting: deque[BatchItem] = field(default_factory=deque)
    """Sequences that wait for a forward."""
    windows_left: Counter[int] = field(default_factory=Counter)
    """Sequences without an output, by document."""
    documents_done: int = 0
    """Documents that need no further forward."""
    documents_reported: int = -1
    """`documents_done` at the last progress report; -1 before the first."""
    started: float | None = None
    """Start of its first forward, on the clock of time.monotonic()."""

    @property
    def has_started(self) -> bool:
        """True if it has had a forward."""
        return self.started is not None

    @property
    def tokens_left(self) -> float:
        """Tokens that still need a forward, including an estimate for text that is not tokenized yet."""
        waiting = tuple(self.waiting)  # one atomic copy: the tokenization thread asks while the engine's thread appends
        return sum(item.length for item in waiting) + self.characters_left / CHARACTERS_PER_TOKEN

    @property
    def is_scored(self) -> bool:
        """True if every sequence has its output."""
        return self.is_tokenized and not self.waiting and all(output is not None for output in self.outputs)

    def urgency(self, now: float) -> tuple[int, float]:
        """Return the sort key, most urgent first: the level, then the remaining tokens; age lowers both."""
        age = now - self.job.arrived
        return effective_level(self.job.level, age), self.tokens_left / TOKENS_PER_S - age

    def add_hits(self, cache_keys: list[bytes], hits: dict[int, Score]) -> None:
        """Store the cached scores, whose documents need no forward."""
        self.cache_keys, self.hits = cache_keys, hits
        self.documents_done += len(hits)
        self.characters_left -= sum(len(self.request.documents[document]) for document in hits)

    def add_sequences(self, sequences: Iterable[TokenSequence], *, characters: int) -> None:
        """Append tokenized sequences, made from `characters` characters of the documents."""
        self.characters_left -= characters
        for sequence in sequences:
            self.waiting.append(BatchItem(self, len(self.sequences), sequence))
            self.sequences.append(sequence)
            self.outputs.append(None)
            if sequence.document is not None:
                self.windows_left[sequence.document] += 1

    def add_output(self, item: BatchItem, output: torch.Tensor) -> None:
        """Store the scorer's output for a sequence."""
        self.outputs[item.index] = output
        document = item.sequence.document
        if document is not None:
            self.windows_left[document] -= 1
            self.documents_done += not self.windows_left[document]


@dataclass(frozen=True, eq=False)
class BatchItem:
    """A sequence and the request that it belongs to."""

    state: RequestState
    index: int
    """Its place in `RequestState.sequences`."""
    sequence: TokenSequence

    @property
    def length(self) -> int:
        """Tokens of a forward that it takes."""
        return self.sequence.length

    @property
    def name(self) -> str:
        """For errors."""
        return f"{self.sequence.name} with {self.length:,} tokens"
