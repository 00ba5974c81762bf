"""Linear layers with low-rank products, for each batch row its own.

The products of all combinations in use are stacked once per layer; a forward selects one per row. Slots of the stacks
are written when a combination joins, so images that come and go rarely cause a new stack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from genserve_backend.devices import copy_together
from genserve_backend.flux.lora.cache import Combination
from genserve_backend.flux.lora.weights import Shape
from genserve_backend.matrices import low_rank_product

RANK_MULTIPLE = 8
"""Ranks of stacks are multiples of it, as matrix units want; few different ones also mean few compiled graphs."""
SELECTIONS_KEPT = 64


class Selection:
    """The slots of the rows of the next forward, shared by all layers of a model."""

    slots: Tensor | None = None
    """int64 ``[B]``, 0 for a row without adapters; None if no row has any."""


class Adapted(nn.Module):
    """Mixin for a linear layer of any kind. Without adapters in the batch, it is that layer."""

    selection: Selection
    down: Tensor | None = None
    """``[slots, rank, inputs]``; slot 0 is zero."""
    up: Tensor | None = None
    """``[slots, rank, outputs]``."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return the product of ``[B, inputs]`` or ``[B, S, inputs]``, with each row's change added."""
        product: Tensor = super().forward(input)
        slots = self.selection.slots
        if slots is None or self.down is None or self.up is None:
            return product
        return add_low_rank(product, input, self.down.index_select(0, slots), self.up.index_select(0, slots))


def add_low_rank(product: Tensor, states: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return ``product + states @ down.T @ up``, for each batch row with its own factors.

    The factors of a row are copied for it: 1 % of what reading its states takes, for an image of 1024 x 1024 pixels. A
    row without adapters adds exact zeros. No row's numbers ever meet those of another.

    Args:
        product: ``[B, outputs]`` or ``[B, S, outputs]``; it may be overwritten.
        states: The layer's input.
        down: ``[B, rank, inputs]``.
        up: ``[B, rank, outputs]``.
    """
    if states.dim() == 2:
        return add_low_rank(product[:, None], states[:, None], down, up)[:, 0]
    if states.device.type == "cpu":
        return product.add_(low_rank_product(states, down, up))
    return product.baddbmm_(torch.bmm(down, states.transpose(1, 2)).transpose(1, 2), up)


@cache
def _adapted(kind: Any) -> Any:
    """Return a kind of layer with the mixin."""
    return type(f"Adapted{kind.__name__}", (Adapted, kind), {"__module__": __name__})


class AdaptedModel:
    """A model whose linear layers take adapters. Their names, weights and arguments stay the same.

    Args:
        model: The model, in its final form: a layer that is replaced afterwards takes no adapters.
        part: Its name in the pipeline.
        device: Its device.
        dtype: Its dtype.
        takes_turns: Whether stacks hold the combinations of one forward only. Their shapes then follow from its rows.
    """

    def __init__(
        self, model: nn.Module, part: str, *, device: torch.device, dtype: torch.dtype, takes_turns: bool = False
    ) -> None:
        self._model = model
        self._part = part
        self._takes_turns = takes_turns
        self._device = device
        self._dtype = dtype
        self._selection = Selection()
        self._layers: dict[str, Any] = {}
        self._slots: WeakKeyDictionary[Combination, int] = WeakKeyDictionary()
        self._capacity = 0
        self._selections: dict[tuple[int, ...], Tensor] = {}
        for name, layer in model.named_modules():
            if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
                kind: Any = type(layer)
                layer.__class__ = _adapted(kind)
                layer.selection = self._selection
                self._layers[name] = layer

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes of the layers, by name."""
        return {name: Shape(layer.in_features, layer.out_features) for name, layer in self._layers.items()}

    @property
    def nbytes(self) -> int:
        """Device memory of the stacks."""
        stacks = (stack for layer in self._layers.values() for stack in (layer.down, layer.up))
        return sum(stack.nbytes for stack in stacks if stack is not None)

    def select(self, combinations: Sequence[Combination | None]) -> None:
        """Give the rows of the next forward their adapters, which have to be on the device.

        Args:
            combinations: One per batch row; None for a row without adapters.
        """
        wanted = [each if each is not None and each.adapts(self._part) else None for each in combinations]
        if not any(wanted):
            self._selection.slots = None
            return
        self._stack(wanted)
        slots = tuple(0 if each is None else self._slots[each] for each in wanted)
        if slots not in self._selections:
            if len(self._selections) >= SELECTIONS_KEPT:
                self._selections.clear()
            (self._selections[slots],) = copy_together([slots], self._device)
        self._selection.slots = self._selections[slots]

    def trim(self) -> None:
        """Free the stacks if nobody holds a combination any more."""
        if self._capacity and not self._slots:
            self.clear()

    def _stack(self, combinations: Sequence[Combination | None]) -> None:
        """Make sure that every combination has a slot."""
        wanted = [each for each in dict.fromkeys(combinations) if each is not None]
        missing = [each for each in wanted if each not in self._slots]
        if self._takes_turns and wanted != list(self._slots):
            self._rebuild(wanted)
            return
        if not missing:
            return
        users = [*self._slots, *missing]
        ranks = self._ranks(users)
        free = sorted(set(range(1, self._capacity)) - set(self._slots.values()))
        if len(free) >= len(missing) and self._fits(ranks, len(users)):
            self._fill(missing, free)
            return
        try:
            self._rebuild(users)
        except torch.OutOfMemoryError:
            self._rebuild(wanted)

    def _rebuild(self, users: Sequence[Combination]) -> None:
        """Replace the stacks by new ones for `users` only."""
        self.clear()
        ranks = self._ranks(users)
        try:
            self._allocate(ranks, _capacity(len(users)))
            self._fill(users, range(1, len(users) + 1))
        except BaseException:
            self.clear()
            raise

    def _ranks(self, users: Sequence[Combination]) -> dict[str, int]:
        """Return the ranks that the stacks need, by layer."""
        ranks: dict[str, int] = {}
        for combination in users:
            for layer, rank in combination.ranks(self._part).items():
                ranks[layer] = max(ranks.get(layer, 0), -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE)
        if _is_compiled(self._model):
            # Every layer has a stack: a graph for each set of adapted layers would be too many.
            return dict.fromkeys(self._layers, RANK_MULTIPLE) | ranks
        return ranks

    def _fits(self, ranks: Mapping[str, int], users: int) -> bool:
        """Return whether the stacks are large enough, and at most twice as large as new ones."""
        size = 0
        for name, rank in ranks.items():
            layer = self._layers[name]
            if layer.down is None or layer.down.shape[1] < rank:
                return False
            size += (layer.in_features + layer.out_features) * rank
        return self.nbytes <= 2 * size * _capacity(users) * self._dtype.itemsize

    def _allocate(self, ranks: Mapping[str, int], capacity: int) -> None:
        for name, rank in ranks.items():
            layer = self._layers[name]
            layer.down = self._zeros(capacity, rank, layer.in_features)
            layer.up = self._zeros(capacity, rank, layer.out_features)
        self._capacity = capacity

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def _fill(self, combinations: Sequence[Combination], slots: Sequence[int]) -> None:
        """Write combinations to slots. What is left of an earlier one in `up` meets zeros."""
        for combination, slot in zip(combinations, slots, strict=False):
            for name, layer in self._layers.items():
                if layer.down is None:
                    continue
                down, up = layer.down[slot].zero_(), layer.up[slot]
                first = 0
                for low_rank, weight in combination.products(self._part, name):
                    end = first + low_rank.rank
                    down[first:end] = low_rank.down.T
                    torch.mul(low_rank.up, weight, out=up[first:end])
                    first = end
            self._slots[combination] = slot

    def clear(self) -> None:
        """Free the stacks; the next forward makes those that it needs."""
        for layer in self._layers.values():
            layer.down = layer.up = None
        self._slots.clear()
        self._selections.clear()
        self._selection.slots = None
        self._capacity = 0


def _capacity(users: int) -> int:
    """Return the slots for a number of combinations and for none: a power of two, so that few join at a cost."""
    return 1 << users.bit_length()


def _is_compiled(model: nn.Module) -> bool:
    """Return whether the model or any block of it is compiled in place."""
    return any(module._compiled_call_impl is not None for module in model.modules())
