"""Loaded adapters: a cache within a budget of bytes, and the combinations that images in flight use."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from weakref import WeakSet, WeakValueDictionary

import torch

from genserve_backend.devices import move
from genserve_backend.flux.lora.folder import AdapterFile, Version
from genserve_backend.flux.lora.weights import LowRank, Weights

Key = tuple[tuple[str, Version, float], ...]
"""Names, versions and weights of a combination's adapters, in the request's order."""


class Adapter:
    """A version of an adapter, in host memory until the first image that uses it starts.

    Its products are views of one tensor, so that a single copy brings them to a device.

    Args:
        file: The file that was read.
        weights: Its products.
        device: The model's device.
    """

    def __init__(self, file: AdapterFile, weights: Weights, device: torch.device) -> None:
        self.name, self.version = file.name, file.version
        self.on_device = False
        self._device = device
        flat = torch.cat([factor.flatten() for factors in _factors(weights) for factor in factors])
        if device.type == "cuda":
            flat = flat.pin_memory()  # here, because that takes long, and this is not the engine's thread
        self._flat = flat
        self.weights = _views(weights, flat)
        """Products by part of the pipeline and by layer."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(self._flat.nbytes)

    def place(self) -> None:
        """Copy the products to the model's device, unless they are there."""
        if not self.on_device:
            flat = move(self._flat, self._device)
            self._flat, self.weights, self.on_device = flat, _views(self.weights, flat), True


def _factors(weights: Weights) -> Iterator[LowRank]:
    for layers in weights.values():
        yield from layers.values()


def _views(weights: Weights, flat: torch.Tensor) -> Weights:
    """Return products of the same shapes in the memory of `flat`, one after the other."""
    sizes = [factor.numel() for factors in _factors(weights) for factor in factors]
    pieces = iter(torch.split(flat, sizes))
    return {
        part: {
            layer: LowRank(*(next(pieces).view(factor.shape) for factor in factors))
            for layer, factors in layers.items()
        }
        for part, layers in weights.items()
    }


class Part(NamedTuple):
    """An adapter of a combination."""

    adapter: Adapter
    weight: float


class Combination:
    """The adapters of an image with their weights; images with the same ones share it while they are in flight.

    Args:
        parts: At least one.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)

    def adapts(self, part: str) -> bool:
        """Return whether a part of the pipeline is adapted."""
        return any(each.adapter.weights.get(part) for each in self.parts)

    def key(self, part: str) -> Key:
        """Return the identity of what the adapters do to a part of the pipeline."""
        return tuple(
            (each.adapter.name, each.adapter.version, each.weight)
            for each in self.parts
            if each.adapter.weights.get(part)
        )

    def products(self, part: str, layer: str) -> Iterator[tuple[LowRank, float]]:
        """Yield the products of a layer with the weights of their adapters."""
        for each in self.parts:
            if low_rank := each.adapter.weights.get(part, {}).get(layer):
                yield low_rank, each.weight

    def ranks(self, part: str) -> dict[str, int]:
        """Return the ranks of all products together, by layer."""
        ranks: dict[str, int] = {}
        for each in self.parts:
            for layer, low_rank in each.adapter.weights.get(part, {}).items():
                ranks[layer] = ranks.get(layer, 0) + low_rank.rank
        return ranks


class NeutralCombination(Combination):
    """Combination of no adapters that takes a slot like any other, for a warm-up."""

    def __init__(self) -> None:
        super().__init__(())

    def adapts(self, part: str) -> bool:
        """Return true."""
        return True


class AdapterCache:
    """The latest version of each adapter that was used, within a budget; callable from any thread.

    Whoever holds a combination has its adapters in use. Adapters in use stay, even beyond the budget and if their file
    has changed; of the others, the least recently used ones are dropped first.

    Args:
        max_bytes: The budget.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()
        self._alive: WeakSet[Adapter] = WeakSet()
        self._combinations: WeakValueDictionary[Key, Combination] = WeakValueDictionary()
        self._evictions = 0

    def get(self, file: AdapterFile) -> Adapter | None:
        """Return the adapter of a file, if it is cached in this version."""
        with self._lock:
            adapter = self._adapters.get(file.name)
            if adapter is None or adapter.version != file.version:
                return None
            self._adapters.move_to_end(file.name)
            return adapter

    def put(self, adapter: Adapter) -> None:
        """Add an adapter; it replaces an older version."""
        with self._lock:
            self._adapters.pop(adapter.name, None)
            self._adapters[adapter.name] = adapter
            self._alive.add(adapter)

    def discard(self, adapter: Adapter) -> None:
        """Remove an adapter that cannot be used."""
        with self._lock:
            if self._adapters.get(adapter.name) is adapter:
                del self._adapters[adapter.name]

    def combine(self, parts: Sequence[Part]) -> Combination:
        """Return the combination of adapters; the same one as long as anybody holds it."""
        key = tuple((adapter.name, adapter.version, weight) for adapter, weight in parts)
        with self._lock:
            combination = self._combinations.get(key)
            if combination is None:
                combination = self._combinations[key] = Combination(parts)
            return combination

    def trim(self) -> None:
        """Drop the least recently used adapters that are not in use, until the budget holds."""
        with self._lock:
            if self._cached_bytes() <= self._max_bytes:
                return
            used = {each.adapter for combination in self._combinations.values() for each in combination.parts}
            for name, adapter in list(self._adapters.items()):
                if adapter not in used:
                    del self._adapters[name]
                    self._evictions += 1
                    if self._cached_bytes() <= self._max_bytes:
                        return

    def on_device(self) -> list[Adapter]:
        """Return the adapters on the device, with old versions that are still in use."""
        with self._lock:
            return [adapter for adapter in self._alive if adapter.on_device]

    def pop_evictions(self) -> int:
        """Return the number of dropped adapters since the last call."""
        with self._lock:
            evictions, self._evictions = self._evictions, 0
        return evictions

    def _cached_bytes(self) -> int:
        return sum(adapter.nbytes for adapter in self._adapters.values())
