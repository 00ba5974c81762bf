"""Batching: which sequences of which requests share the next forward."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from genserve_backend.rerank.state import BatchItem, RequestState

FEW = 4
"""Up to this many waiting requests, forwards that finish none of them stay short, because a request that arrives
meanwhile waits for the current forward. With more, every forward is filled."""
SHORT = 0.5
"""The share of the token budget that a short forward may use."""
MAX_PADDING = 0.25
"""The largest share of a padded batch row that may be padding; shorter sequences wait for a forward of their length."""


def choose(
    states: Collection[RequestState], *, now: float, max_num_seqs: int, max_num_batched_tokens: int, padded: bool
) -> list[BatchItem]:
    """Remove the next forward's sequences from their requests and return them.

    The most urgent request goes first; others fill the rest of the budget. In a padded forward all sequences have about
    the length of the longest one of the most urgent request, and padding counts towards the budget.

    Args:
        states: All requests.
        now: On the clock of `Job.arrived`.
        max_num_seqs: Sequences, at most.
        max_num_batched_tokens: Tokens, at most; a longer sequence runs alone.
        padded: Whether the sequences are padded to the longest.
    """
    order = sorted((state for state in states if state.waiting), key=lambda state: state.urgency(now))
    if not order:
        return []
    if padded:
        batch = _of_similar_length(order, max_num_seqs, max_num_batched_tokens)
    else:
        batch = _by_urgency(order, max_num_seqs, max_num_batched_tokens)
    chosen = set(batch)
    for state in {item.state for item in batch}:
        state.waiting = deque(item for item in state.waiting if item not in chosen)
    return batch


def _by_urgency(order: list[RequestState], max_num_seqs: int, max_num_batched_tokens: int) -> list[BatchItem]:
    few = len(order) <= FEW
    short = int(max_num_batched_tokens * SHORT) if few else max_num_batched_tokens
    batch: list[BatchItem] = []
    tokens = 0
    for state in order:
        finishes = (
            state.is_tokenized
            and len(batch) + len(state.waiting) <= max_num_seqs
            and tokens + sum(item.length for item in state.waiting) <= max_num_batched_tokens
        )
        budget = max_num_batched_tokens if finishes else short
        for item in state.waiting:
            if len(batch) >= max_num_seqs:
                return batch
            if batch and tokens + item.length > budget:
                break
            batch.append(item)
            tokens += item.length
        if few and finishes:
            short = 0  # a request that finishes in this forward must not wait for one that does not
    return batch


def _of_similar_length(order: list[RequestState], max_num_seqs: int, max_num_batched_tokens: int) -> list[BatchItem]:
    width = max(item.length for item in order[0].waiting)
    fitting = [item for state in order for item in state.waiting if width * (1 - MAX_PADDING) <= item.length <= width]
    fitting.sort(key=lambda item: -item.length)  # stable: of equal lengths the more urgent one comes first
    return fitting[: max(1, min(max_num_seqs, max_num_batched_tokens // width))]
