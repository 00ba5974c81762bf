"""Parts of the virtual clock: its events, the settings and the results of a run, and a request on its way."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.figures import TOLERANCE, Outcome
from genserve_backend.settings import FluxSettings
from simulated.device import Device
from simulated.traffic import Arrival

TASK_TIMEOUT_S = 240.0
QUEUE_SIZE = 150
"""Of each level."""


@dataclass(frozen=True)
class Setup:
    """Settings of a simulated server.

    Attributes:
        device: Of each instance.
        instances: Their number.
        policy: A policy of the engine, or a baseline.
        max_running: Slots of an instance, and images of a static batch.
        max_tokens: Image tokens of all slots, and of a static batch.
        max_waiting: Requests that an instance holds in addition.
        queue_size: Limit of Triton's queue, of each level.
        timeout_s: Deadline of requests without one.
        usual_tokens: Image tokens of the checkpoint's native size.
    """

    device: Device
    instances: int = 1
    policy: str = "urgency"
    max_running: int = FluxSettings.model_fields["max_running"].default
    max_tokens: int = FluxSettings.model_fields["max_batched_tokens"].default
    max_waiting: int = FluxSettings.model_fields["max_gpu_queue_size"].default
    queue_size: int = QUEUE_SIZE
    timeout_s: float = TASK_TIMEOUT_S
    usual_tokens: int = 4096


@dataclass(frozen=True)
class Ran:
    """Results of a run.

    Attributes:
        outcomes: One per request, in their order.
        seconds: From the first arrival to the last answer.
        busy_s: Seconds in which each device worked.
        taken_s: From the first arrival to the moment when an instance took the last request.
        busy_taken_s: Seconds in which the devices had worked by then, together.
    """

    outcomes: list[Outcome]
    seconds: float
    busy_s: list[float]
    taken_s: float
    busy_taken_s: float


class VirtualImage:
    """A request on its way; for policies and `Intake`, an image."""

    __slots__ = (
        "arrival",
        "arrived",
        "batch_rows",
        "cost",
        "deadline",
        "has_own_deadline",
        "has_slot",
        "has_started",
        "index",
        "level",
        "ran_at",
        "size",
        "stepped_at",
        "steps",
        "steps_left",
        "tokens",
        "waited_s",
    )

    def __init__(self, index: int, arrival: Arrival, *, own_s: float, timeout_s: float) -> None:
        self.index = index
        self.arrival = arrival
        self.size = arrival.size
        self.steps = self.steps_left = arrival.steps
        self.level = arrival.level
        self.tokens = arrival.tokens
        self.batch_rows = arrival.rows
        self.cost = self.tokens * self.batch_rows
        self.has_own_deadline = arrival.scale is not None
        self.deadline = arrival.at + (timeout_s if arrival.scale is None else arrival.scale * own_s * (1 + TOLERANCE))
        self.arrived = arrival.at
        self.waited_s = 0.0
        self.has_started = self.has_slot = False
        self.ran_at = 0
        self.stepped_at = 0.0


class Clock:
    """Events in the order of their times."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[..., None], Any]] = []
        self._count = 0

    def at(self, time: float, do: Callable[..., None], *arguments: Any) -> None:
        """Call a function at a time."""
        self._count += 1
        heapq.heappush(self._events, (time, self._count, do, arguments))

    def run(self) -> None:
        """Run all events."""
        events = self._events
        while events:
            self.now, _, do, arguments = heapq.heappop(events)
            do(*arguments)
