"""Prefixes: found in tokens, computed once, bounded in memory."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from genserve_backend.rerank.attention import KeysValues
from genserve_backend.rerank.prefix import Prefix, PrefixCache, shared


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
def test_shared(texts: list[list[int]], head: list[int], length: int) -> None:
    assert shared(texts, head) == length


class Computed:
    """Makes keys and values that show which tokens they are of: 8 bytes a token."""

    def __init__(self) -> None:
        self.calls: list[list[list[int]]] = []

    def __call__(self, texts: Sequence[list[int]], before: Sequence[KeysValues | None]) -> list[KeysValues]:
        self.calls.append([list(text) for text in texts])
        return [self._continue(text, known) for text, known in zip(texts, before, strict=True)]

    @staticmethod
    def _continue(text: list[int], known: KeysValues | None) -> KeysValues:
        new = torch.tensor(text, dtype=torch.float32).reshape(1, 1, -1, 1)
        whole = torch.cat([known.layers[0][0], new], dim=2) if known else new
        return KeysValues(((whole, whole.clone()),))


def ids(known: KeysValues) -> list[int]:
    return [int(each) for each in known.layers[0][0].flatten()]


def test_a_prefix_is_computed_once_and_continues_its_parent() -> None:
    compute = Computed()
    cache = PrefixCache(max_bytes=2**20, compute=compute)
    parent = Prefix((1, 2))
    first, second = Prefix((1, 2, 3), parent), Prefix((1, 2, 4, 5), parent)
    found = cache.get([first, second, first])
    assert {key: ids(known) for key, known in found.items()} == {(1, 2, 3): [1, 2, 3], (1, 2, 4, 5): [1, 2, 4, 5]}
    assert compute.calls == [[[1, 2]], [[3], [4, 5]]]
    cache.get([second, Prefix((1, 2, 6), parent)])
    assert compute.calls[2:] == [[[6]]]
    assert cache.computed_tokens == 6


def test_memory_is_bounded_and_the_oldest_go_first() -> None:
    compute = Computed()
    cache = PrefixCache(max_bytes=5 * 8, compute=compute)
    cache.get([Prefix((1, 2))])
    cache.get([Prefix((3, 4))])
    cache.get([Prefix((1, 2))])
    cache.get([Prefix((5, 6))])
    assert cache.nbytes <= 5 * 8
    cache.get([Prefix((1, 2))])
    assert len(compute.calls) == 3
    cache.get([Prefix((3, 4))])
    assert len(compute.calls) == 4


def test_a_prefix_beyond_the_memory_is_still_computed() -> None:
    cache = PrefixCache(max_bytes=8, compute=Computed())
    found = cache.get([Prefix((1, 2, 3))])
    assert ids(found[1, 2, 3]) == [1, 2, 3]
    assert cache.nbytes == 0
