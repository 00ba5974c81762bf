"""A cache of scores from earlier requests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from threading import Lock
from typing import NamedTuple

from cachetools import LRUCache

from genserve_backend.rerank.request import RerankRequest

BYTES_PER_SCORE = 360
"""Memory of an entry: its key, its score and the cache's own links (measured, rounded up)."""
_KEY_BYTES = 16


class Score(NamedTuple):
    """The score of a document."""

    value: float
    truncated: bool
    """True if the document was cut to the length limit."""


class ScoreCache:
    """Scores by a hash of everything that they depend on. Thread-safe.

    Args:
        max_bytes: Most memory for the scores; the least recently used are evicted first. 0 disables the cache.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._scores: LRUCache[bytes, Score] = LRUCache(max_bytes // BYTES_PER_SCORE)
        self._lock = Lock()

    def keys(self, request: RerankRequest) -> list[bytes]:
        """Return a key for each document; none if the cache is disabled."""
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
        """Return the cached scores, by the position of their key."""
        with self._lock:
            return {index: score for index, key in enumerate(keys) if (score := self._scores.get(key)) is not None}

    def put(self, scores: Iterable[tuple[bytes, Score]]) -> None:
        """Store scores by their keys."""
        with self._lock:
            self._scores.update(scores)

    def __len__(self) -> int:
        return len(self._scores)


def _hash(texts: Iterable[str]) -> hashlib.blake2b:
    """Return a hash over `texts`, each preceded by its length so that no other texts have the same."""
    state = hashlib.blake2b(digest_size=_KEY_BYTES)
    for text in texts:
        encoded = text.encode()
        state.update(len(encoded).to_bytes(8, "little"))
        state.update(encoded)
    return state
