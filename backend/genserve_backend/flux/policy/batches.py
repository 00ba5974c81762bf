"""Batches: which running images share a forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from genserve_backend.flux.policy.base import Image, ImageT

TURNS = {1: 4, 2: 2, 3: 1}
"""Relative frequency of forwards by priority level, where images of different sizes take turns."""


def turn(image: Image, tick: int) -> int:
    """Return how long an image has been left out, weighted by its level. It is at least 1."""
    return (tick + 1 - image.ran_at) * TURNS[image.level]


def by_turn(running: Sequence[ImageT], tick: int) -> list[ImageT]:
    """Return the images sorted by their turns. Images that are left out move up, so none starves."""
    return sorted(running, key=lambda image: turn(image, tick), reverse=True)


def fill(
    order: Sequence[ImageT],
    *,
    max_tokens: int,
    max_padding: float,
    may_join: Callable[[ImageT, int, int], bool] = lambda image, batch_rows, tokens: True,
) -> list[ImageT]:
    """Return the first image of `order` and those that share its forward, in any order.

    Images of the first one's size join it, then images of similar sizes, as long as no image is padded by more than
    `max_padding` of its tokens and the batch stays within `max_tokens`. A single image may exceed that limit.
    `may_join` decides about each one that fits, given the rows of the forward with it and the tokens of each row.
    """
    lead = order[0]
    chosen = [lead]
    longest, shortest, batch_rows = lead.tokens, lead.tokens, lead.batch_rows
    # Sizes closest to the lead's first. Sorting is stable, so images of one size stay in the given order.
    for image in sorted(order[1:], key=lambda image: abs(image.tokens - lead.tokens)):
        new_longest, new_shortest = max(longest, image.tokens), min(shortest, image.tokens)
        new_batch_rows = batch_rows + image.batch_rows
        fits = new_longest * new_batch_rows <= max_tokens and new_longest <= new_shortest * (1 + max_padding)
        if fits and may_join(image, new_batch_rows, new_longest):
            chosen.append(image)
            longest, shortest, batch_rows = new_longest, new_shortest, new_batch_rows
    return chosen


def in_order(running: Sequence[ImageT], chosen: Sequence[ImageT]) -> list[ImageT]:
    """Return the chosen images in the order of `running`, which keeps a batch the same from tick to tick."""
    return [image for image in running if image in chosen]
