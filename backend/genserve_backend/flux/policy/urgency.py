"""The policy `urgency`: priority levels with aging, and turns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from genserve_backend.flux.policy.base import ImageT, Limits
from genserve_backend.flux.policy.batches import by_turn, fill, in_order
from genserve_backend.flux.policy.slots import assign_slots, by_age


class Urgency:
    """Slots by level and age; sizes take turns; deadlines play no part.

    Args:
        limits: Slots, tokens and padding.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def assign(self, images: Collection[ImageT], now: float) -> tuple[list[ImageT], list[ImageT]]:
        """Return the images with a slot and the others, by level after aging, then started ones, then the oldest."""
        order = sorted(images, key=by_age)
        return assign_slots(order, max_running=self._limits.max_running, max_tokens=self._limits.max_tokens)

    def choose(
        self, running: Sequence[ImageT], waiting: Sequence[ImageT], *, tick: int, now: float, max_tokens: int
    ) -> list[ImageT]:
        """Return the image whose turn it is and those that fit in with it."""
        chosen = fill(by_turn(running, tick), max_tokens=max_tokens, max_padding=self._limits.max_padding)
        return in_order(running, chosen)

    def refused(self, images: Collection[ImageT], now: float) -> Mapping[ImageT, float]:
        """Return nothing: no image is refused."""
        return {}
