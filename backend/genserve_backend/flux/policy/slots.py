"""Slots by priority level: which images run, which wait, and which lose their slot."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from genserve_backend.flux.policy.base import Image, ImageT
from genserve_backend.worker.messages import LEVELS
from genserve_backend.worker.scheduling import effective_level


def current_level(image: Image) -> int:
    """Return the level of an image after aging."""
    return effective_level(image.level, image.waited_s)


def by_age(image: Image) -> tuple[int, bool, float]:
    """Return the sorting key that puts the more urgent level first, within it started images, then the oldest."""
    return current_level(image), not image.has_started, image.arrived


def assign_slots(
    images: Collection[ImageT], *, max_running: int, max_tokens: int, urgency: Callable[[Image], Any] = by_age
) -> tuple[list[ImageT], list[ImageT]]:
    """Return the images that run and the images that wait, each sorted by urgency.

    Free slots go to the most urgent. Preemption compares the newcomer's own level with the level of the running image
    after aging. Waiting alone therefore never preempts anyone, and an image that has waited long enough is not
    preempted again. An image that does not fit yet blocks the images behind it that are not more urgent. An image
    larger than `max_tokens` runs alone.

    Args:
        images: All unfinished images.
        max_running: Number of slots.
        max_tokens: Limit on the image tokens of all slots together.
        urgency: Sorting key; the level after aging comes first.
    """
    running = sorted((image for image in images if image.has_slot), key=urgency)
    waiting: list[ImageT] = []

    def fits(image: ImageT, others: Sequence[ImageT]) -> bool:
        cost = image.cost + sum(other.cost for other in others)
        return len(others) < max_running and (cost <= max_tokens or not others)

    blocked = LEVELS[-1] + 1
    for image in sorted((image for image in images if not image.has_slot), key=urgency):
        stay = list(running)
        while not fits(image, stay) and stay and current_level(stay[-1]) > image.level:
            stay.pop()
        if fits(image, stay) and image.level < blocked:
            waiting += running[len(stay) :]
            running = sorted([*stay, image], key=urgency)
        else:
            waiting.append(image)
            blocked = min(blocked, image.level)
    return running, sorted(waiting, key=urgency)
