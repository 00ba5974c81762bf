"""Prefix caching: shared lengths, reuse and eviction."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from genserve_backend.rerank.attention import KeysValues
from genserve_backend.rerank.prefix import Prefix, PrefixCache, shared_length


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


class Computed:
    """Computes keys and values that equal their token ids; 8 bytes per token."""

    def __init__(self) -> None:
        self.calls: list[list[list[int]]] = []

    def __call__(self, texts: Sequence[list[int]], before: Sequence[KeysValues | None]) -> list[KeysValues]:
        self.calls.append([list(text) for text in texts])
        return [self._continue(text, prefix) for text, prefix in zip(texts, before, strict=True)]

    @staticmethod
    def _continue(text: list[int], prefix: KeysValues | None) -> KeysValues:
        new = torch.tensor(text, dtype=torch.float32).reshape(1, 1, -1, 1)
        whole = torch.cat([prefix.layers[0][0], new], dim=2) if prefix else new
        return KeysValues(((whole, whole.clone()),))


def ids(keys_values: KeysValues) -> list[int]:
    return [int(each) for each in keys_values.layers[0][0].flatten()]


def test_prefixes_are_computed_once_and_extend_their_parent() -> None:
    compute = Computed()
    cache = PrefixCache(max_bytes=2**20, compute=compute)
    parent = Prefix((1, 2))
    first, second = Prefix((1, 2, 3), parent), Prefix((1, 2, 4, 5), parent)
    found = cache.get([first, second, first])
    assert {key: ids(keys_values) for key, keys_values in found.items()} == {
        (1, 2, 3): [1, 2, 3],
        (1, 2, 4, 5): [1, 2, 4, 5],
    }
    assert compute.calls == [[[1, 2]], [[3], [4, 5]]]
    cache.get([second, Prefix((1, 2, 6), parent)])
    assert compute.calls[2:] == [[[6]]]
    assert cache.computed_tokens == 6


def test_least_recently_used_prefix_is_evicted() -> None:
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


def test_prefix_larger_than_the_cache_is_computed_but_not_stored() -> None:
    cache = PrefixCache(max_bytes=8, compute=Computed())
    found = cache.get([Prefix((1, 2, 3))])
    assert ids(found[1, 2, 3]) == [1, 2, 3]
    assert cache.nbytes == 0
