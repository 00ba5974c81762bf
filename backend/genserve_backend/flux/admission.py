"""Admission: when to take more requests from Triton's queue. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from genserve_backend.worker.scheduling import GrantCounter


class Candidate(Protocol):
    """The properties of an image that admission depends on."""

    @property
    def cost(self) -> int:
        """Image tokens of a forward, over all batch rows."""

    @property
    def steps_left(self) -> int:
        """Steps until the image is finished."""


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
