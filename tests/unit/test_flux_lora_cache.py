"""The cache of adapters: budget, versions, and adapters in use."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from genserve_backend.flux.lora.cache import Adapter, AdapterCache, Combination, Part
from genserve_backend.flux.lora.folder import AdapterFile, Version
from genserve_backend.flux.lora.weights import LowRank

CPU = torch.device("cpu")
NBYTES = 4 * (8 * 2 + 2 * 4)


def file(name: str, version: int = 1) -> AdapterFile:
    return AdapterFile(name, Path(name), Version(version, 10, 1))


def adapter(name: str, version: int = 1, *, layer: str = "to_q", part: str = "transformer") -> Adapter:
    low_rank = LowRank(torch.full((8, 2), 1.0), torch.full((2, 4), 2.0))
    return Adapter(file(name, version), {part: {layer: low_rank}}, CPU)


def cached(cache: AdapterCache, *names: str) -> list[bool]:
    return [cache.get(file(name)) is not None for name in names]


def use(cache: AdapterCache, *adapters: Adapter) -> Combination:
    for each in adapters:
        each.place()
    return cache.combine([Part(each, 1.0) for each in adapters])


def test_least_recently_used_is_dropped_first() -> None:
    cache = AdapterCache(2 * NBYTES)
    for name in "abc":
        cache.put(adapter(name))
    assert cache.get(file("a"))
    cache.trim()
    assert cached(cache, "a", "b", "c") == [True, False, True]
    assert cache.pop_evictions() == 1
    assert cache.pop_evictions() == 0


def test_adapters_in_use_stay_beyond_the_budget() -> None:
    cache = AdapterCache(0)
    used, other = adapter("a"), adapter("b")
    cache.put(used)
    cache.put(other)
    combination = use(cache, used)
    cache.trim()
    assert cached(cache, "a", "b") == [True, False]
    assert [each.name for each in cache.on_device()] == ["a"]
    del combination, used, other
    gc.collect()
    cache.trim()
    assert cached(cache, "a") == [False]
    assert cache.on_device() == []


def test_new_version_replaces_the_old_one_which_stays_while_in_use() -> None:
    cache = AdapterCache(10 * NBYTES)
    old = adapter("a")
    cache.put(old)
    held = use(cache, old)
    assert cache.get(file("a", 2)) is None
    new = adapter("a", 2)
    cache.put(new)
    assert cache.get(file("a", 2)) is new
    assert cache.get(file("a", 1)) is None
    assert held.parts[0].adapter is old
    assert len(cache.on_device()) == 1
    new.place()
    assert len(cache.on_device()) == 2


def test_discarded_adapter_is_gone_unless_it_was_replaced() -> None:
    cache = AdapterCache(10 * NBYTES)
    old, new = adapter("a"), adapter("a")
    cache.put(old)
    cache.put(new)
    cache.discard(old)
    assert cache.get(file("a")) is new
    cache.discard(new)
    assert cache.get(file("a")) is None


def test_images_in_flight_share_their_combination() -> None:
    cache = AdapterCache(10 * NBYTES)
    one, other = adapter("a"), adapter("b")
    combination = use(cache, one, other)
    assert use(cache, one, other) is combination
    assert use(cache, other, one) is not combination
    assert cache.combine([Part(one, 0.5)]) is not cache.combine([Part(one, 1.0)])


def test_combination_knows_what_it_adapts() -> None:
    image, text = adapter("a"), adapter("b", part="text_encoder")
    both = Combination([Part(image, 0.5), Part(text, 2.0), Part(adapter("c", layer="to_k"), 1.0)])
    assert both.adapts("transformer")
    assert both.adapts("text_encoder")
    assert not Combination([Part(image, 1.0)]).adapts("text_encoder")
    assert both.ranks("transformer") == {"to_q": 2, "to_k": 2}
    assert [(low_rank.rank, weight) for low_rank, weight in both.products("transformer", "to_q")] == [(2, 0.5)]
    assert both.key("text_encoder") == (("b", Version(1, 10, 1), 2.0),)


@pytest.mark.parametrize("placed", [False, True], ids=["host", "device"])
def test_products_survive_the_copy_to_the_device(placed: bool) -> None:
    each = adapter("a")
    if placed:
        each.place()
    assert each.on_device is placed
    assert each.nbytes == NBYTES
    low_rank = each.weights["transformer"]["to_q"]
    assert torch.equal(low_rank.down, torch.full((8, 2), 1.0))
    assert torch.equal(low_rank.up, torch.full((2, 4), 2.0))
