"""Prefix caching: shared lengths, slots, reuse, eviction and failures."""

from __future__ import annotations

import pytest

from genserve_backend.rerank.prefix import Plan, Prefix, PrefixCache, shared_length

PARENT = Prefix((1, 2))
FIRST, SECOND = Prefix((1, 2, 3), PARENT), Prefix((1, 2, 4, 5), PARENT)


@pytest.mark.parametrize(
    ("texts", "head", "length"),
    [
        ([[1, 2, 3, 9]], [1, 2, 3], 3),
        ([[1, 2, 7, 9]], [1, 2, 3], 2),
        ([[1, 2, 3], [1, 5]], [1, 2, 3], 1),
        ([[1, 2]], [1, 2, 3], 2),
        ([[]], [1], 0),
        ([[4]], [1], 0),
        ([], [1, 2], 2),
    ],
    ids=str,
)
def test_shared_length(texts: list[list[int]], head: list[int], length: int) -> None:
    assert shared_length(texts, head) == length


def computed(plan: Plan) -> list[list[int]]:
    """The new tokens of the prefixes that a forward computes."""
    return [entry.prefix.new_ids.tolist() for entry in plan.missing]


def slots(cache: PrefixCache, plan: Plan) -> list[list[int]]:
    """The slots of each sequence's prefix."""
    return [
        [int(slot) for part in (entry.chain if entry else []) if part.slots is not None for slot in part.slots]
        for entry in plan.entries
    ]


def test_prefixes_are_computed_once_and_extend_their_parent() -> None:
    cache = PrefixCache(slots=100)
    plan = cache.plan([FIRST, SECOND, None, Prefix((1, 2, 3), Prefix((1, 2)))])
    assert computed(plan) == [[1, 2], [3], [4, 5]], "equal prefixes of two requests count once"
    first, second, none, again = slots(cache, plan)
    assert first == again
    assert none == []
    assert first[:2] == second[:2], "both share their parent's slots"
    assert len({*first, *second}) == 5
    assert cache.free_slots == 95
    later = cache.plan([SECOND, Prefix((1, 2, 6), PARENT)])
    assert computed(later) == [[6]]
    assert slots(cache, later)[0] == second
    assert cache.computed_tokens == 6


def test_least_recently_used_prefix_is_evicted() -> None:
    cache = PrefixCache(slots=5)
    for ids in ((1, 2), (3, 4), (1, 2), (5, 6)):
        cache.plan([Prefix(ids)])
    assert cache.free_slots == 1
    assert computed(cache.plan([Prefix((1, 2))])) == []
    assert computed(cache.plan([Prefix((3, 4))])) == [[3, 4]]


def test_prefix_that_another_one_extends_stays() -> None:
    cache = PrefixCache(slots=4)
    cache.plan([FIRST])
    plan = cache.plan([Prefix((7, 8))])
    assert len(cache) == 2, "the child went, then the parent had no child"
    assert cache.free_slots == 0
    assert computed(plan) == [[7, 8]]
    assert computed(cache.plan([PARENT])) == []


def test_prefixes_of_the_same_forward_do_not_evict_each_other() -> None:
    cache = PrefixCache(slots=3)
    cache.plan([Prefix((1, 2))])
    plan = cache.plan([Prefix((3, 4)), Prefix((1, 2)), Prefix((5,))])
    by_ids = {entry.prefix.ids: entry.slots for entry in plan.entries if entry}
    assert by_ids[3, 4] is None, "no room, so it is computed for this forward only"
    assert by_ids[1, 2] is not None
    assert by_ids[5,] is not None
    assert computed(plan) == [[5], [3, 4]], "those with slots come first"
    assert computed(cache.plan([Prefix((3, 4))])) == [[3, 4]]


def test_prefix_larger_than_the_cache_is_computed_but_not_stored() -> None:
    cache = PrefixCache(slots=3)
    large = Prefix((1, 2, 3, 4, 5, 6), PARENT)
    plan = cache.plan([large])
    assert computed(plan) == [[1, 2], [3, 4, 5, 6]]
    assert computed(cache.plan([large])) == [[3, 4, 5, 6]]
    child = Prefix((1, 2, 3, 4, 5, 6, 7), large)
    assert computed(cache.plan([child])) == [[3, 4, 5, 6], [7]], "it extends a prefix that has no slots"
    assert len(cache) == 1
    assert cache.free_slots == 1


def test_prefixes_of_a_failed_forward_are_lost() -> None:
    cache = PrefixCache(slots=100)
    failed = cache.plan([FIRST])
    queued = cache.plan([SECOND, FIRST])
    unrelated = cache.plan([Prefix((8,))])
    assert not queued.has_lost
    cache.drop(failed)
    assert queued.has_lost, "it reads the parent that was not computed"
    assert not unrelated.has_lost
    assert len(cache) == 1, "what extends a lost prefix is lost, too"
    assert cache.free_slots == 99
    again = cache.plan([FIRST, SECOND])
    assert computed(again) == [[1, 2], [3], [4, 5]]
    cache.drop(queued)
    assert not again.has_lost
    assert computed(cache.plan([FIRST, SECOND])) == [], "its prefixes are not those of the failed forward"
    assert cache.free_slots == 94
