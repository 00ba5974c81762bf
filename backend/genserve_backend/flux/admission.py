"""Who has a place to run, who waits for one, and when to ask Triton's queue for more. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol, TypeVar

from genserve_backend.worker.messages import LEVELS

AGING_S = 10.0
"""Seconds of waiting in the engine after which an image counts as one level more urgent."""


class Candidate(Protocol):
    """What admission looks at in an image."""

    @property
    def level(self) -> int:
        """Priority level, 1 the most urgent."""

    @property
    def waited_s(self) -> float:
        """Seconds in the engine without a place."""

    @property
    def has_started(self) -> bool:
        """Whether it has run before."""

    @property
    def has_place(self) -> bool:
        """Whether it runs now."""

    @property
    def arrived(self) -> float:
        """When it came; any clock."""

    @property
    def cost(self) -> int:
        """Image tokens of a forward that it takes."""

    @property
    def steps_left(self) -> int:
        """Steps that it still needs."""


CandidateT = TypeVar("CandidateT", bound=Candidate)


def level_now(image: Candidate) -> int:
    """The level that an image counts as: its own, or a more urgent one after it has waited."""
    return max(LEVELS[0], image.level - int(image.waited_s / AGING_S))


def arrange(
    images: Collection[CandidateT], *, max_running: int, max_tokens: int
) -> tuple[list[CandidateT], list[CandidateT]]:
    """Who runs, and who waits, each in the order of urgency.

    Free places go to the more urgent level first, waiting counted in, within a level to those that have started, then
    to those that came first. An image loses its place only to one whose own level is more urgent than what it counts as
    itself: waiting alone takes nobody's place, and whoever has waited long enough is not paused again. An image that
    does not fit yet keeps those behind it that are no more urgent from overtaking it. One that is larger than
    `max_tokens` runs alone.

    Args:
        images: All that are not finished.
        max_running: Places, at most.
        max_tokens: Image tokens of all places, at most.
    """
    running = sorted((image for image in images if image.has_place), key=_urgency)
    waiting: list[CandidateT] = []

    def fits(image: CandidateT, others: Sequence[CandidateT]) -> bool:
        cost = image.cost + sum(other.cost for other in others)
        return len(others) < max_running and (cost <= max_tokens or not others)

    blocked = LEVELS[-1] + 1
    for image in sorted((image for image in images if not image.has_place), key=_urgency):
        stay = list(running)
        while not fits(image, stay) and stay and level_now(stay[-1]) > image.level:
            stay.pop()
        if fits(image, stay) and image.level < blocked:
            waiting += running[len(stay) :]
            running = sorted([*stay, image], key=_urgency)
        else:
            waiting.append(image)
            blocked = min(blocked, image.level)
    return running, sorted(waiting, key=_urgency)


def _urgency(image: Candidate) -> tuple[int, bool, float]:
    return level_now(image), not image.has_started, image.arrived


class Intake:
    """Decides how many requests to ask for.

    While there are free places it asks for as many requests as they are likely to hold. When all are taken it goes on
    to ask for up to `max_waiting` more, one at a time and spread evenly over the ticks until the next image is
    finished: an urgent request that comes in between is then heard of soon, and may take another one's place.

    Args:
        max_running: Places.
        max_tokens: Image tokens of all places.
        max_waiting: Requests held beyond the places.
        usual_cost: Image tokens of a request, as long as there is none to tell.
    """

    def __init__(self, *, max_running: int, max_tokens: int, max_waiting: int, usual_cost: int) -> None:
        self._max_running = max_running
        self._max_tokens = max_tokens
        self._max_waiting = max_waiting
        self._usual_cost = usual_cost
        self._asked = 0
        """Requests asked for that have not come; below zero after a restart, which brings some unasked."""
        self._asked_at = 0

    def came(self) -> None:
        """A request is here."""
        self._asked -= 1

    def ask(self, running: Sequence[Candidate], waiting: Sequence[Candidate], *, tick: int) -> int:
        """How many requests to ask for now."""
        count = 0
        while self._has_place(running, waiting):
            count += 1
            self._asked += 1
        if not count and running and self._may_hold(running, waiting, tick):
            count = 1
            self._asked += 1
        if count:
            self._asked_at = tick
        return count

    def _has_place(self, running: Sequence[Candidate], waiting: Sequence[Candidate]) -> bool:
        coming = max(0, self._asked) + len(waiting)
        cost = sum(image.cost for image in running)
        usual = cost / len(running) if running else self._usual_cost
        fits = cost + (coming + 1) * usual <= self._max_tokens or not (running or coming)
        return len(running) + coming < self._max_running and fits

    def _may_hold(self, running: Sequence[Candidate], waiting: Sequence[Candidate], tick: int) -> bool:
        free = self._max_waiting - len(waiting) - max(0, self._asked)
        if free <= 0:
            return False
        since = tick - self._asked_at
        return since >= (since + min(image.steps_left for image in running)) / (free + 1)
