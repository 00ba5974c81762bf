"""Slots by priority level: which images run, which wait, and which lose their slot."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from genserve_backend.flux.policy.base import Image, ImageT
from genserve_backend.worker.messages import LEVELS
from genserve_backend.worker.scheduling import effective_level


def current_level(image: Image) -> int:
    """Return the level of an image after aging."""
    return effective_level(image.level, image.waited_s)


def by_age(image: Image) -> tuple[int, bool, float]:
    """Return the sorting key that puts the more urgent level first, within it started images, then the oldest."""
    return current_level(image), not image.has_started, image.arrived


def is_less_urgent(running: Image, newcomer: Image) -> bool:
    """Return whether a newcomer takes the slot of a running image.

    The newcomer's own level counts, and the running image's level after aging. Waiting alone therefore never preempts
    anyone, and an image that has waited long enough is not preempted again.
    """
    return current_level(running) > newcomer.level


def assign_slots(
    images: Iterable[ImageT],
    *,
    max_running: int,
    max_tokens: int,
    preemptable: Callable[[ImageT, ImageT], bool] = is_less_urgent,
) -> tuple[list[ImageT], list[ImageT]]:
    """Return the images that run and the images that wait, each in the given order.

    An image that does not fit yet blocks the images behind it that are not more urgent. An image larger than
    `max_tokens` runs alone.

    Args:
        images: All unfinished images, the first one gets a slot first.
        max_running: Number of slots.
        max_tokens: Limit on the image tokens of all slots together.
        preemptable: Returns whether a running image loses its slot to a newcomer that comes before it.
    """
    order = {image: number for number, image in enumerate(images)}
    running = [image for image in order if image.has_slot]
    waiting: list[ImageT] = []
    used = sum(image.cost for image in running)
    blocked = LEVELS[-1] + 1

    for image in [image for image in order if not image.has_slot]:
        stay, cost = len(running), used + image.cost
        while not (fits := stay < max_running and (cost <= max_tokens or not stay)):
            if not stay or not preemptable(running[stay - 1], image):
                break
            stay -= 1
            cost -= running[stay].cost
        if fits and image.level < blocked:
            waiting += running[stay:]
            running = sorted([*running[:stay], image], key=order.__getitem__)
            used = cost
        else:
            waiting.append(image)
            blocked = min(blocked, image.level)
    return running, sorted(waiting, key=order.__getitem__)
