"""A plan: which deadlines one device can meet, and how much time is to spare."""

from __future__ import annotations

from bisect import insort
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic

from genserve_backend.flux.policy.base import Costs, Image, ImageT

OPTIMISM = 0.95
"""Share of the estimated time in which an image may still be finished: it is given up only below that."""
RESERVE = 0.2
"""Share of the estimated time that is kept free, for errors of the estimates and for images that arrive later."""


@dataclass(eq=False)
class Entry(Generic[ImageT]):
    """An image in a plan."""

    image: ImageT
    budget_s: float
    """Seconds until its last step has to be done."""
    step_s: float
    """Seconds of a step alone."""
    share_s: float
    """Its share of the seconds of a step in a batch of its size."""
    work_s: float
    """Its share of the seconds of its remaining steps."""
    slack_s: float
    """Seconds that it may wait if it then has the whole device, without the reserve."""
    is_doomed: bool
    """True if not even the whole device can finish it in time."""
    spare_s: float = 0.0
    """Seconds that the device may spend on work outside the plan before its last step, without the reserve."""


class Plan(Generic[ImageT]):
    """The deadlines that can be met together, by the rule of Moore and Hodgson.

    On one device that does the earliest deadline first, dropping the longest work from those up to the first late one
    loses the fewest deadlines. It also prefers small images, and those that are nearly finished. More urgent levels are
    planned first, and never give up a deadline for another level.

    Args:
        images: All unfinished images. Those without a deadline of their own take no part.
        costs: Estimates of the time of their work.
        now: The time.
        max_tokens: Limit on the image tokens of a forward.
    """

    def __init__(self, images: Iterable[ImageT], costs: Costs, now: float, *, max_tokens: int) -> None:
        timed = _entries([image for image in images if image.has_own_deadline], costs, now, max_tokens)
        hopeful = [entry for entry in timed if not entry.is_doomed]
        self.entries = sorted(hopeful, key=_budget)
        """The images that can be finished in time, the earliest deadline first."""
        if self._until_late():
            self.entries = []
            for entry in sorted(hopeful, key=_level_and_budget):
                insort(self.entries, entry, key=_budget)
                self._drop_late(entry.image.level)
        self.order = {entry.image: number for number, entry in enumerate(self.entries)}
        """Their numbers."""
        late = sorted((entry for entry in timed if entry.image not in self.order), key=_hope)
        self.late = [entry.image for entry in late]
        """The other images with deadlines of their own, those that need the least time first."""
        total = 0.0
        for entry in self.entries:
            total += entry.work_s
            entry.spare_s = entry.budget_s - (1 + RESERVE) * total
        self.free_s = min((min(entry.spare_s, entry.slack_s) for entry in self.entries), default=float("inf"))
        """Seconds that the device may spend on other work now, without the reserve."""
        self.is_tight = self.free_s <= max((entry.step_s for entry in self.entries), default=0.0)
        """True if not even a step of the longest kind may be spent on other work."""
        by_level = self.entries if self.is_tight else sorted(self.entries, key=_level_and_budget)
        self.queue = [entry.image for entry in by_level]
        """The planned images, the next one first: by level, and the earliest deadline first if the plan is tight."""

    def _drop_late(self, level: int) -> None:
        """Drop images of `level` until no image is late. All were on time before the last one was added."""
        while late := self._until_late():
            longest = max((entry for entry in late if entry.image.level == level), key=_length)
            self.entries.remove(longest)

    def _until_late(self) -> Sequence[Entry[ImageT]]:
        """Return the entries up to the first late one; empty if none is late."""
        total = 0.0
        for number, entry in enumerate(self.entries):
            total += entry.work_s
            if total * OPTIMISM > entry.budget_s:
                return self.entries[: number + 1]
        return []


def time_alone_s(image: Image, costs: Costs) -> float:
    """Return the seconds from now to the answer, if the image has the device for itself."""
    return image.steps_left * costs.step_s(image.batch_rows, image.tokens) + _around_s(image, costs)


def _around_s(image: Image, costs: Costs) -> float:
    """Return the seconds of an image's work before its first and after its last step."""
    return costs.decode_s(image.tokens) + (0.0 if image.has_started else costs.encode_s())


def _entries(timed: Sequence[ImageT], costs: Costs, now: float, max_tokens: int) -> list[Entry[ImageT]]:
    rows: defaultdict[int, int] = defaultdict(int)
    for image in timed:
        rows[image.tokens] += image.batch_rows
    together = {tokens: max(1, min(count, max_tokens // tokens)) for tokens, count in rows.items()}
    row_s = {tokens: costs.step_s(count, tokens) / count for tokens, count in together.items()}
    entries = []
    for image in timed:
        step_s = costs.step_s(image.batch_rows, image.tokens)
        share_s = min(step_s, row_s[image.tokens] * image.batch_rows)
        budget_s, steps = image.deadline - now - _around_s(image, costs), image.steps_left
        entries.append(
            Entry(
                image,
                budget_s,
                step_s=step_s,
                share_s=share_s,
                work_s=share_s * steps,
                slack_s=budget_s - (1 + RESERVE) * step_s * steps,
                is_doomed=step_s * steps * OPTIMISM > budget_s,
            )
        )
    return entries


def _budget(entry: Entry[ImageT]) -> float:
    return entry.budget_s


def _level_and_budget(entry: Entry[ImageT]) -> tuple[int, float]:
    return entry.image.level, entry.budget_s


def _hope(entry: Entry[ImageT]) -> tuple[bool, float]:
    return entry.is_doomed, entry.work_s


def _length(entry: Entry[ImageT]) -> tuple[float, bool, float]:
    return entry.work_s, not entry.image.has_slot, entry.image.arrived
