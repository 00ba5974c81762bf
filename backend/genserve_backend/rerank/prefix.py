"""Prefix caching: the keys and values of tokens that several prompts begin with, computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cachetools import LRUCache

from genserve_backend.rerank.attention import KeysValues


@dataclass(frozen=True)
class Prefix:
    """The tokens that some prompts begin with. It may extend a shorter prefix."""

    ids: tuple[int, ...]
    """All tokens, including those of the parent."""
    parent: Prefix | None = None
    """A shorter prefix that `ids` begins with."""

    @property
    def new_ids(self) -> list[int]:
        """The tokens after those of the parent."""
        return list(self.ids[len(self.parent.ids) if self.parent else 0 :])


Compute = Callable[[Sequence[list[int]], Sequence[KeysValues | None]], Sequence[KeysValues]]


class PrefixCache:
    """A cache of prefixes' keys and values.

    Args:
        max_bytes: Most device memory for them; the least recently used are evicted first. A larger prefix is computed
            again for each forward.
        compute: Runs token sequences, each after a prefix or nothing, and returns the keys and values of both.
    """

    def __init__(self, *, max_bytes: int, compute: Compute) -> None:
        self._cache: LRUCache[tuple[int, ...], KeysValues] = LRUCache(max_bytes, getsizeof=lambda cached: cached.nbytes)
        self._compute = compute
        self.computed_tokens = 0
        """Tokens that were computed for prefixes so far."""

    @property
    def nbytes(self) -> int:
        """Memory in use."""
        return int(self._cache.currsize)

    def get(self, prefixes: Iterable[Prefix]) -> dict[tuple[int, ...], KeysValues]:
        """Return the keys and values of prefixes, by their ids. Missing ones are computed in one forward."""
        wanted = {prefix.ids: prefix for prefix in prefixes}
        found = {ids: cached for ids in wanted if (cached := self._cache.get(ids)) is not None}
        missing = [prefix for ids, prefix in wanted.items() if ids not in found]
        if not missing:
            return found
        parents = self.get(prefix.parent for prefix in missing if prefix.parent)
        before = [parents[prefix.parent.ids] if prefix.parent else None for prefix in missing]
        computed = self._compute([prefix.new_ids for prefix in missing], before)
        self.computed_tokens += sum(len(prefix.new_ids) for prefix in missing)
        for prefix, keys_values in zip(missing, computed, strict=True):
            found[prefix.ids] = keys_values
            if keys_values.nbytes <= self._cache.maxsize:
                self._cache[prefix.ids] = keys_values
        return found


def shared_length(texts: Sequence[Sequence[int]], head: Sequence[int]) -> int:
    """Return the number of tokens of `head` that all `texts` begin with.

    It may be less than all of `head`: a tokenizer may merge its end with the text that follows.
    """
    length = len(head)
    for text in texts:
        length = min(length, len(text))
        while list(text[:length]) != list(head[:length]):
            length -= 1
    return length
