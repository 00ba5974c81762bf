"""The policies `fifo` and `shortest`: one fixed order for slots and forwards, without levels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from genserve_backend.flux.policy.base import Image, ImageT, Limits
from genserve_backend.flux.policy.batches import fill, in_order


def first_come(image: Image) -> float:
    """Return the sorting key of `fifo`: the arrival."""
    return image.arrived


def least_work(image: Image) -> tuple[float, float]:
    """Return the sorting key of `shortest`: the image tokens of all steps that are left, then the arrival."""
    return image.cost * image.steps_left, image.arrived


class Ordered:
    """Slots and forwards in one order. An image that comes before a running one takes its slot.

    Args:
        limits: Slots, tokens and padding.
        key: Sorting key, the first image is served first. The others may starve as long as such images arrive.
    """

    def __init__(self, limits: Limits, key: Callable[[Image], float | tuple[float, ...]]) -> None:
        self._limits = limits
        self._key = key

    def assign(self, images: Collection[ImageT], now: float) -> tuple[list[ImageT], list[ImageT]]:
        """Return the first images that fit, and the others. An image that does not fit blocks those behind it."""
        order = sorted(images, key=self._key)
        running, cost = 0, 0
        for image in order[: self._limits.max_running]:
            cost += image.cost
            if cost > self._limits.max_tokens and running:
                break
            running += 1
        return order[:running], order[running:]

    def choose(
        self, running: Sequence[ImageT], waiting: Sequence[ImageT], *, tick: int, now: float, max_tokens: int
    ) -> list[ImageT]:
        """Return the first image and those that fit in with it."""
        order = sorted(running, key=self._key)
        return in_order(running, fill(order, max_tokens=max_tokens, max_padding=self._limits.max_padding))

    def refused(self, images: Collection[ImageT], now: float) -> Mapping[ImageT, float]:
        """Return nothing: no image is refused."""
        return {}
