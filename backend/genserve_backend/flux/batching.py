"""Which of the running images take a step together. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

TURNS = {1: 4, 2: 2, 3: 1}
"""Where images of different sizes take turns, those of a level get so many turns for one of level 3's."""


class Runner(Protocol):
    """What batching looks at in an image."""

    @property
    def level(self) -> int:
        """Priority level, 1 the most urgent."""

    @property
    def tokens(self) -> int:
        """Image tokens of one row."""

    @property
    def rows(self) -> int:
        """Rows of the forward that it takes."""

    @property
    def ran_at(self) -> int:
        """The tick of its last step, or of its arrival."""


RunnerT = TypeVar("RunnerT", bound=Runner)


def choose(running: Sequence[RunnerT], *, tick: int, max_tokens: int, max_padding: float) -> list[RunnerT]:
    """The images of the next forward; never none while some run.

    The one whose turn it is comes first. With it go those of the same size, and then those of sizes near enough that
    no image is padded by more than `max_padding` of its tokens, all of them within `max_tokens`. Whoever is left out
    moves up: nobody waits for ever.

    Args:
        running: Images that have a place.
        tick: Counts forwards.
        max_tokens: Image tokens of the forward, padding included; one image alone may exceed it.
        max_padding: Padding tokens for one of an image's own, at most; 0 keeps sizes apart.
    """
    by_turn = sorted(running, key=lambda image: (tick + 1 - image.ran_at) * TURNS[image.level], reverse=True)
    lead = by_turn[0]
    chosen = [lead]
    longest, shortest, rows = lead.tokens, lead.tokens, lead.rows
    # Sizes near the lead's first; sorting is stable, so within a size it is still by turn.
    for image in sorted(by_turn[1:], key=lambda image: abs(image.tokens - lead.tokens)):
        new_longest, new_shortest = max(longest, image.tokens), min(shortest, image.tokens)
        new_rows = rows + image.rows
        if new_longest * new_rows <= max_tokens and new_longest <= new_shortest * (1 + max_padding):
            chosen.append(image)
            longest, shortest, rows = new_longest, new_shortest, new_rows
    # A stable order, so that the denoiser's batch is the same one from tick to tick.
    return [image for image in running if image in chosen]
