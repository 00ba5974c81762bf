"""Scores that are known from earlier requests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from threading import Lock
from typing import NamedTuple

from cachetools import LRUCache

from genserve_backend.rerank.request import RerankRequest

BYTES_PER_SCORE = 360
"""What an entry takes in memory: key, score and the cache's own links (measured, rounded up)."""
_KEY_BYTES = 16


class Score(NamedTuple):
    """What is known of a document."""

    value: float
    truncated: bool
    """Whether it was cut to the length limit."""


class ScoreCache:
    """The last scores, by a hash of everything that they depend on. Any thread may ask.

    Args:
        max_bytes: Memory for them, at most; the least recently used go first. 0 keeps none.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._scores: LRUCache[bytes, Score] = LRUCache(max_bytes // BYTES_PER_SCORE)
        self._lock = Lock()

    def keys(self, request: RerankRequest) -> list[bytes]:
        """A key for each document; none where nothing is kept."""
        if not self._scores.maxsize:
            return []
        start = _hash((str(request.windows), request.instruction or "", request.query))
        keys = []
        for document in request.documents:
            pair = start.copy()
            pair.update(document.encode())
            keys.append(pair.digest())
        return keys

    def get(self, keys: Iterable[bytes]) -> dict[int, Score]:
        """The scores that are known, by the number of the key."""
        with self._lock:
            return {number: score for number, key in enumerate(keys) if (score := self._scores.get(key)) is not None}

    def put(self, scores: Iterable[tuple[bytes, Score]]) -> None:
        """Keep scores."""
        with self._lock:
            self._scores.update(scores)

    def __len__(self) -> int:
        return len(self._scores)


def _hash(texts: Iterable[str]) -> hashlib.blake2b:
    """A hash that has taken in `texts`, each with its length: no other texts give the same."""
    state = hashlib.blake2b(digest_size=_KEY_BYTES)
    for text in texts:
        encoded = text.encode()
        state.update(len(encoded).to_bytes(8, "little"))
        state.update(encoded)
    return state
