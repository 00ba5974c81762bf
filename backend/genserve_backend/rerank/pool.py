"""The sequences of all requests that are in the engine, and which of them share the next forward."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch

from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.score_cache import Score
from genserve_backend.rerank.scorers.layouts import TokenSequence
from genserve_backend.worker.engine import Job
from genserve_backend.worker.messages import LEVELS

AGING_S = 10.0
"""Seconds in the engine after which a request counts as one level more urgent."""
TOKENS_PER_S = 2_000
"""Tokens that a request may have left more than another one, for each second that it is older, and still go first."""
FEW = 4
"""While no more requests than these wait, forwards are kept short where they finish none: one that comes meanwhile has
to wait for the current one. With more requests waiting, every forward is as full as can be."""
SHORT = 0.5
"""The part of the budget that such a forward takes."""
MAX_PADDING = 0.25
"""The share of a padded row that may be padding; what is shorter waits for a forward of its like."""
CHARACTERS_PER_TOKEN = 4
"""A rough guess at documents that have not been read yet."""


@dataclass(eq=False)
class Ranking:
    """A request in the engine."""

    job: Job
    request: RerankRequest
    unread: int
    """Characters that the tokenizer has not come to."""
    waiting: deque[Piece] = field(default_factory=deque)
    """What is tokenised and not yet in a forward."""
    rows: list[torch.Tensor | None] = field(default_factory=list)
    """What the model made of each sequence, in the order in which they were read."""
    sequences: list[TokenSequence] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    """Of the documents in `ScoreCache`, if it keeps any."""
    known: dict[int, Score] = field(default_factory=dict)
    """Scores by document that need no forward."""
    is_read: bool = False
    """Whether there are no more sequences to come."""
    windows_left: Counter[int] = field(default_factory=Counter)
    """Sequences without a row, by document."""
    documents_done: int = 0
    """Documents whose score needs no further forward."""
    documents_reported: int = -1
    """The progress that was sent last; -1 before the first."""
    query_truncated: bool = False
    started: float | None = None
    """When its first forward began."""

    def read(self, sequences: Iterable[TokenSequence], *, characters: int) -> None:
        """Take over sequences that were made of so many characters."""
        self.unread -= characters
        for sequence in sequences:
            self.waiting.append(Piece(self, len(self.sequences), sequence))
            self.sequences.append(sequence)
            self.rows.append(None)
            if sequence.document is not None:
                self.windows_left[sequence.document] += 1

    def keep(self, piece: Piece, row: torch.Tensor) -> None:
        """Take over the row of a sequence."""
        self.rows[piece.number] = row
        document = piece.sequence.document
        if document is not None:
            self.windows_left[document] -= 1
            self.documents_done += not self.windows_left[document]

    @property
    def tokens_left(self) -> float:
        """Tokens that the model still has to read, some of them guessed."""
        waiting = tuple(self.waiting)  # at once: the reader's thread asks too, while the engine's adds to them
        return sum(piece.length for piece in waiting) + self.unread / CHARACTERS_PER_TOKEN

    @property
    def is_scored(self) -> bool:
        """Whether every sequence has its row."""
        return self.is_read and not self.waiting and all(row is not None for row in self.rows)

    def urgency(self, now: float) -> tuple[int, float]:
        """The lower, the sooner: by level, then by what is left, and both less with age."""
        age = now - self.job.arrived
        level = max(LEVELS[0], self.job.submit.level - int(age / AGING_S))
        return level, self.tokens_left / TOKENS_PER_S - age


@dataclass(frozen=True, eq=False)
class Piece:
    """A sequence with the request that it belongs to."""

    ranking: Ranking
    number: int
    sequence: TokenSequence

    @property
    def length(self) -> int:
        """Tokens to read."""
        return self.sequence.length


def choose(
    rankings: Collection[Ranking], *, now: float, max_num_seqs: int, max_num_batched_tokens: int, padded: bool
) -> list[Piece]:
    """Take the next forward's sequences out of the requests.

    The most urgent request goes first; others fill what it leaves. Where rows are padded they have to be about as long
    as the longest of its sequences, and the padding counts.

    Args:
        rankings: All requests.
        now: On the clock of `Job.arrived`.
        max_num_seqs: Sequences, at most.
        max_num_batched_tokens: Tokens, at most; a sequence that is longer goes alone.
        padded: Whether every sequence will be as long as the longest.
    """
    order = sorted((each for each in rankings if each.waiting), key=lambda each: each.urgency(now))
    if not order:
        return []
    if padded:
        chosen = _alike(order, max_num_seqs, max_num_batched_tokens)
    else:
        chosen = _in_order(order, max_num_seqs, max_num_batched_tokens)
    taken = set(chosen)
    for ranking in {piece.ranking for piece in chosen}:
        ranking.waiting = deque(piece for piece in ranking.waiting if piece not in taken)
    return chosen


def _in_order(order: list[Ranking], max_num_seqs: int, max_num_batched_tokens: int) -> list[Piece]:
    few = len(order) <= FEW
    short = int(max_num_batched_tokens * SHORT) if few else max_num_batched_tokens
    chosen: list[Piece] = []
    tokens = 0
    for ranking in order:
        finishes = (
            ranking.is_read
            and len(chosen) + len(ranking.waiting) <= max_num_seqs
            and tokens + sum(piece.length for piece in ranking.waiting) <= max_num_batched_tokens
        )
        budget = max_num_batched_tokens if finishes else short
        for piece in ranking.waiting:
            if len(chosen) >= max_num_seqs:
                return chosen
            if chosen and tokens + piece.length > budget:
                break
            chosen.append(piece)
            tokens += piece.length
        if few and finishes:
            short = 0  # what is finished now should not have to wait for what is not
    return chosen


def _alike(order: list[Ranking], max_num_seqs: int, max_num_batched_tokens: int) -> list[Piece]:
    width = max(piece.length for piece in order[0].waiting)
    fitting = [
        piece for ranking in order for piece in ranking.waiting if width * (1 - MAX_PADDING) <= piece.length <= width
    ]
    # Stable: of two that are equally long the more urgent one comes first.
    fitting.sort(key=lambda piece: -piece.length)
    return fitting[: max(1, min(max_num_seqs, max_num_batched_tokens // width))]
