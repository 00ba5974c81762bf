"""Batching: which running images share the next forward. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

TURNS = {1: 4, 2: 2, 3: 1}
"""Relative frequency of forwards by priority level, where images of different sizes take turns."""


class Runner(Protocol):
    """The properties of an image that batching depends on."""

    @property
    def level(self) -> int:
        """Priority level, 1 is the most urgent."""

    @property
    def tokens(self) -> int:
        """Image tokens of one batch row."""

    @property
    def batch_rows(self) -> int:
        """Batch rows of a forward."""

    @property
    def ran_at(self) -> int:
        """Tick of the last step, or of the arrival."""


RunnerT = TypeVar("RunnerT", bound=Runner)


def choose(running: Sequence[RunnerT], *, tick: int, max_tokens: int, max_padding: float) -> list[RunnerT]:
    """Return the images of the next forward, at least one.

    The image whose turn it is leads. Images of the same size join it, then images of similar sizes, as long as no image
    is padded by more than `max_padding` of its tokens and the batch stays within `max_tokens`. Images that are left out
    move up, so none starves.

    Args:
        running: Images with a slot; not empty.
        tick: Counter of forwards.
        max_tokens: Limit on the image tokens of the forward, including padding. A single image may exceed it.
        max_padding: Largest ratio of padding to an image's own tokens; 0 keeps sizes apart.
    """
    by_turn = sorted(running, key=lambda image: (tick + 1 - image.ran_at) * TURNS[image.level], reverse=True)
    lead = by_turn[0]
    chosen = [lead]
    longest, shortest, batch_rows = lead.tokens, lead.tokens, lead.batch_rows
    # Sizes closest to the lead's first. Sorting is stable, so images of one size stay in the order of their turns.
    for image in sorted(by_turn[1:], key=lambda image: abs(image.tokens - lead.tokens)):
        new_longest, new_shortest = max(longest, image.tokens), min(shortest, image.tokens)
        new_batch_rows = batch_rows + image.batch_rows
        if new_longest * new_batch_rows <= max_tokens and new_longest <= new_shortest * (1 + max_padding):
            chosen.append(image)
            longest, shortest, batch_rows = new_longest, new_shortest, new_batch_rows
    # A stable order keeps the denoiser's batch the same from tick to tick.
    return [image for image in running if image in chosen]
