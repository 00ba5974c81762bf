"""What many prompts begin with is read once: its keys and values are kept and continued by each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cachetools import LRUCache

from genserve_backend.rerank.attention import KeysValues


@dataclass(frozen=True)
class Prefix:
    """The beginning of some prompts, itself perhaps the continuation of a shorter one."""

    ids: tuple[int, ...]
    """All tokens from the first on."""
    parent: Prefix | None = None
    """What `ids` begins with."""

    @property
    def own(self) -> list[int]:
        """The tokens that the parent does not have."""
        return list(self.ids[len(self.parent.ids) if self.parent else 0 :])


Compute = Callable[[Sequence[list[int]], Sequence[KeysValues | None]], Sequence[KeysValues]]


class PrefixCache:
    """Keys and values of the last prefixes.

    Args:
        max_bytes: Device memory for them, at most; the least recently used go first. A prefix that is larger by itself
            is computed anew for each forward.
        compute: Reads sequences, each continuing a prefix or nothing, and gives the keys and values up to their ends.
    """

    def __init__(self, *, max_bytes: int, compute: Compute) -> None:
        self._cache: LRUCache[tuple[int, ...], KeysValues] = LRUCache(max_bytes, getsizeof=lambda known: known.nbytes)
        self._compute = compute
        self.computed_tokens = 0
        """Tokens that were read for prefixes so far."""

    @property
    def nbytes(self) -> int:
        """Memory in use."""
        return int(self._cache.currsize)

    def get(self, prefixes: Iterable[Prefix]) -> dict[tuple[int, ...], KeysValues]:
        """The keys and values of prefixes, by their ids; those that are missing are computed together."""
        wanted = {prefix.ids: prefix for prefix in prefixes}
        found = {ids: known for ids in wanted if (known := self._cache.get(ids)) is not None}
        missing = [prefix for ids, prefix in wanted.items() if ids not in found]
        if not missing:
            return found
        parents = self.get(prefix.parent for prefix in missing if prefix.parent)
        before = [parents[prefix.parent.ids] if prefix.parent else None for prefix in missing]
        computed = self._compute([prefix.own for prefix in missing], before)
        self.computed_tokens += sum(len(prefix.own) for prefix in missing)
        for prefix, known in zip(missing, computed, strict=True):
            found[prefix.ids] = known
            if known.nbytes <= self._cache.maxsize:
                self._cache[prefix.ids] = known
        return found


def shared(texts: Sequence[Sequence[int]], head: Sequence[int]) -> int:
    """How many of the tokens of `head` all `texts` begin with.

    A tokenizer may join the end of a head with what follows it, so they need not begin with all of it.
    """
    length = len(head)
    for text in texts:
        length = min(length, len(text))
        while list(text[:length]) != list(head[:length]):
            length -= 1
    return length
