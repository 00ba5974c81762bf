"""Prefix caching: tokens that several prompts begin with, computed once, in the forward of the first that needs them.

Host side only: which prefix is cached in which slots. `prefix_store` has the keys and values.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Prefix:
    """The tokens that some prompts begin with. It may extend a shorter prefix."""

    ids: tuple[int, ...]
    """All tokens, including those of the parent."""
    parent: Prefix | None = None
    """A shorter prefix that `ids` begins with."""
    new_ids: Ids = field(init=False, repr=False, compare=False)
    """int32: the tokens after those of the parent."""

    def __post_init__(self) -> None:
        start = len(self.parent.ids) if self.parent else 0
        object.__setattr__(self, "new_ids", np.array(self.ids[start:], dtype=np.int32))


@dataclass(eq=False)
class Entry:
    """A prefix whose keys and values are cached, or computed by the current forward."""

    prefix: Prefix
    parent: Entry | None
    slots: Ids | None
    """The slots of the prefix's new tokens; None if they are kept for one forward only."""
    children: int = 0
    """Cached prefixes that extend this one."""
    lost: bool = False
    """True if the forward that was to compute it has failed."""

    @property
    def is_lost(self) -> bool:
        """True if its keys and values, or those that it extends, were not computed."""
        return self.lost or (self.parent is not None and self.parent.is_lost)

    @cached_property
    def chain(self) -> list[Entry]:
        """The prefixes that it extends, the shortest first, and itself."""
        return [*(self.parent.chain if self.parent else []), self]


@dataclass(frozen=True)
class Plan:
    """The prefixes of a forward."""

    entries: list[Entry | None]
    """One per sequence; None without a prefix."""
    missing: list[Entry]
    """Those that the forward has to compute, each after its parent; those with slots come first."""

    @property
    def has_lost(self) -> bool:
        """True if a prefix was not computed after all, because the forward before has failed."""
        return any(entry.is_lost for entry in self.entries if entry is not None)

    @property
    def missing_tokens(self) -> int:
        """Tokens of `missing`."""
        return sum(len(entry.prefix.new_ids) for entry in self.missing)


class PrefixCache:
    """The cached prefixes and their slots.

    A prefix has slots for its own tokens only, and shares those of its parent. The least recently used prefixes are
    evicted first, but none that another one extends. Slots may be given to another prefix while a forward that reads
    them is still queued: the device works in the order of the forwards.

    Args:
        slots: Tokens that can be cached. A prefix that finds no room is computed again for each forward.
    """

    def __init__(self, *, slots: int) -> None:
        self._free = np.arange(slots, dtype=np.int32)
        self._entries: OrderedDict[tuple[int, ...], Entry] = OrderedDict()
        """The least recently used first."""
        self.computed_tokens = 0
        """Tokens that were computed for prefixes so far."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def free_slots(self) -> int:
        """Slots without a token."""
        return len(self._free)

    def plan(self, prefixes: Sequence[Prefix | None]) -> Plan:
        """Return the prefixes of a forward, one per sequence, and give slots to those that it has to compute."""
        # Sequences of a request share one object: comparing those first spares hashes of all tokens.
        objects = {id(prefix): prefix for prefix in prefixes if prefix is not None}
        used = self._find(objects.values())
        missing: list[Entry] = []
        wanted = {key: self._entry(prefix, used, missing) for key, prefix in objects.items()}
        missing.sort(key=lambda entry: entry.slots is None)  # stable, and no prefix with slots extends one without
        plan = Plan([None if prefix is None else wanted[id(prefix)] for prefix in prefixes], missing)
        self.computed_tokens += plan.missing_tokens
        return plan

    def drop(self, plan: Plan) -> None:
        """Forget the prefixes that the forward of `plan` was to compute: it has failed."""
        for entry in plan.missing:
            entry.lost = True
        for entry in [entry for entry in reversed(self._entries.values()) if entry.is_lost]:
            self._forget(entry)

    def _find(self, prefixes: Iterable[Prefix]) -> dict[tuple[int, ...], Entry]:
        """Return what is cached of these prefixes and of those that they extend."""
        found: dict[tuple[int, ...], Entry] = {}
        for prefix in prefixes:
            part: Prefix | None = prefix
            while part is not None:
                if (entry := self._entries.get(part.ids)) is not None:
                    found[part.ids] = entry
                    self._entries.move_to_end(part.ids)
                part = part.parent
        return found

    def _entry(self, prefix: Prefix, used: dict[tuple[int, ...], Entry], missing: list[Entry]) -> Entry:
        if (entry := used.get(prefix.ids)) is None:
            parent = self._entry(prefix.parent, used, missing) if prefix.parent else None
            entry = used[prefix.ids] = self._add(prefix, parent, used)
            missing.append(entry)
        return entry

    def _add(self, prefix: Prefix, parent: Entry | None, used: dict[tuple[int, ...], Entry]) -> Entry:
        entry = Entry(prefix, parent, slots=None)
        count = len(prefix.new_ids)
        if (parent is None or parent.slots is not None) and self._make_room(count, used):
            entry.slots, self._free = self._free[:count], self._free[count:]
            self._entries[prefix.ids] = entry
            if parent is not None:
                parent.children += 1
        return entry

    def _make_room(self, count: int, used: dict[tuple[int, ...], Entry]) -> bool:
        """Evict prefixes that this forward does not use until `count` slots are free; return whether they are."""
        if count > len(self._free) + sum(_slots(entry) for ids, entry in self._entries.items() if ids not in used):
            return False
        while count > len(self._free):
            evictable = (entry for ids, entry in self._entries.items() if ids not in used and not entry.children)
            entry = next(evictable, None)
            if entry is None:
                return False
            self._forget(entry)
        return True

    def _forget(self, entry: Entry) -> None:
        del self._entries[entry.prefix.ids]
        if entry.parent is not None:
            entry.parent.children -= 1
        if entry.slots is not None:
            self._free = np.concatenate([self._free, entry.slots])


def _slots(entry: Entry) -> int:
    return 0 if entry.slots is None else len(entry.slots)


def shared_length(texts: Iterable[Sequence[int]], head: Sequence[int]) -> int:
    """Return the number of tokens of `head` that all `texts` begin with.

    It may be less than all of `head`: a tokenizer may merge its end with the text that follows.
    """
    length = len(head)
    for text in texts:
        length = min(length, len(text))
        while list(text[:length]) != list(head[:length]):
            length -= 1
    return length
