"""Admission: which images get a slot, which wait, and when to request more. Does not import torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol, TypeVar

from genserve_backend.worker.messages import LEVELS
from genserve_backend.worker.scheduling import GrantCounter, effective_level


class Candidate(Protocol):
    """The properties of an image that admission depends on."""

    @property
    def level(self) -> int:
        """Priority level, 1 is the most urgent."""

    @property
    def waited_s(self) -> float:
        """Seconds in the engine without a slot."""

    @property
    def has_started(self) -> bool:
        """True once the image has had a slot."""

    @property
    def has_slot(self) -> bool:
        """True while the image has a slot."""

    @property
    def arrived(self) -> float:
        """Time of arrival, on any clock."""

    @property
    def cost(self) -> int:
        """Image tokens of a forward, over all batch rows."""

    @property
    def steps_left(self) -> int:
        """Steps until the image is finished."""


CandidateT = TypeVar("CandidateT", bound=Candidate)


def current_level(image: Candidate) -> int:
    """Return the level of an image after aging."""
    return effective_level(image.level, image.waited_s)


def assign_slots(
    images: Collection[CandidateT], *, max_running: int, max_tokens: int
) -> tuple[list[CandidateT], list[CandidateT]]:
    """Return the images that run and the images that wait, each sorted by urgency.

    Free slots go to the more urgent level after aging first; within a level to images that have started, then to the
    oldest. Preemption compares the newcomer's own level with the level of the running image after aging. Waiting alone
    therefore never preempts anyone, and an image that has waited long enough is not preempted again. An image that does
    not fit yet blocks the images behind it that are not more urgent. An image larger than `max_tokens` runs alone.

    Args:
        images: All unfinished images.
        max_running: Number of slots.
        max_tokens: Limit on the image tokens of all slots together.
    """
    running = sorted((image for image in images if image.has_slot), key=_urgency)
    waiting: list[CandidateT] = []

    def fits(image: CandidateT, others: Sequence[CandidateT]) -> bool:
        cost = image.cost + sum(other.cost for other in others)
        return len(others) < max_running and (cost <= max_tokens or not others)

    blocked = LEVELS[-1] + 1
    for image in sorted((image for image in images if not image.has_slot), key=_urgency):
        stay = list(running)
        while not fits(image, stay) and stay and current_level(stay[-1]) > image.level:
            stay.pop()
        if fits(image, stay) and image.level < blocked:
            waiting += running[len(stay) :]
            running = sorted([*stay, image], key=_urgency)
        else:
            waiting.append(image)
            blocked = min(blocked, image.level)
    return running, sorted(waiting, key=_urgency)


def _urgency(image: Candidate) -> tuple[int, bool, float]:
    return current_level(image), not image.has_started, image.arrived


class Intake:
    """The number of requests to grant.

    While there are free slots, it grants as many requests as are likely to fit. When all slots are taken, it grants up
    to `max_waiting` more, one at a time and spread evenly over the ticks until the next image is finished. An urgent
    request that arrives in between is then received soon, and may preempt another one.

    Args:
        max_running: Number of slots.
        max_tokens: Limit on the image tokens of all slots together.
        max_waiting: Requests held in addition to the running ones.
        usual_cost: Assumed image tokens of a request while none is running.
    """

    def __init__(self, *, max_running: int, max_tokens: int, max_waiting: int, usual_cost: int) -> None:
        self._max_running = max_running
        self._max_tokens = max_tokens
        self._max_waiting = max_waiting
        self._usual_cost = usual_cost
        self._grants = GrantCounter()
        self._granted_at = 0

    def arrived(self) -> None:
        """Record that a request has arrived."""
        self._grants.arrived()

    def grant(self, running: Sequence[Candidate], waiting: Sequence[Candidate], *, tick: int) -> int:
        """Return the number of requests to grant now."""
        count = 0
        while self._has_free_slot(running, waiting):
            count += 1
            self._grants.granted(1)
        if not count and running and self._may_hold(running, waiting, tick):
            count = 1
            self._grants.granted(1)
        if count:
            self._granted_at = tick
        return count

    def _has_free_slot(self, running: Sequence[Candidate], waiting: Sequence[Candidate]) -> bool:
        coming = self._grants.outstanding + len(waiting)
        cost = sum(image.cost for image in running)
        usual = cost / len(running) if running else self._usual_cost
        fits = cost + (coming + 1) * usual <= self._max_tokens or not (running or coming)
        return len(running) + coming < self._max_running and fits

    def _may_hold(self, running: Sequence[Candidate], waiting: Sequence[Candidate], tick: int) -> bool:
        free = self._max_waiting - len(waiting) - self._grants.outstanding
        if free <= 0:
            return False
        since = tick - self._granted_at
        return since >= (since + min(image.steps_left for image in running)) / (free + 1)
