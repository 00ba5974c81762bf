"""Triton's queue on a virtual clock, and the choice between the instances behind it."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from common.figures import Outcome
from simulated.traffic import Arrival
from simulated.virtual.engine import EngineInstance
from simulated.virtual.instances import Instance, LockInstance, StaticInstance
from simulated.virtual.parts import Clock, Ran, Setup, VirtualImage

LEVELS = 3
KINDS: dict[str, type[Instance]] = {"lock": LockInstance, "static": StaticInstance}
"""Instances of the baselines; all other policies run in the engine."""


class Front:
    """Triton's queue, and the instances behind it.

    Args:
        setup: Settings.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.clock = Clock()
        self.outcomes: dict[int, Outcome] = {}
        self._queue: list[deque[VirtualImage]] = [deque() for _ in range(LEVELS)]
        self._free: deque[Instance] = deque()
        """Instances in which no ``execute()`` runs, the longest wait first."""
        self.instances: list[Instance] = [
            KINDS.get(setup.policy, EngineInstance)(self, number) for number in range(setup.instances)
        ]
        self._executing: list[Instance] = list(self.instances)
        self._later: deque[tuple[int, Arrival]] = deque()
        """Requests that follow answers."""
        self._taken = self._busy_taken_s = 0.0

    def run(self, load: Sequence[Arrival], *, in_flight: int | None = None) -> Ran:
        """Run a load until all requests are answered.

        Args:
            load: The requests, by their times.
            in_flight: Keep so many in flight, whatever their times.
        """
        for instance in self.instances:
            instance.start()
        for index, arrival in enumerate(load[:in_flight]):
            self.clock.at(arrival.at if in_flight is None else 0.0, self._arrive, index, arrival)
        self._later = deque(enumerate(load[in_flight:], start=in_flight) if in_flight else ())
        self.clock.run()
        outcomes = [self.outcomes[index] for index in range(len(load))]
        first, last = outcomes[0].arrived, max(each.arrived + each.latency_s for each in outcomes)
        busy_s = [instance.busy_s for instance in self.instances]
        return Ran(outcomes, last - first, busy_s, self._taken - first, self._busy_taken_s)

    def _arrive(self, index: int, arrival: Arrival) -> None:
        if arrival.at != self.clock.now:
            arrival = replace(arrival, at=self.clock.now)
        image = VirtualImage(index, arrival, own_s=arrival.own_s(self.setup.device), timeout_s=self.setup.timeout_s)
        queue = self._queue[image.level - 1]
        if len(queue) >= self.setup.queue_size:
            self._drop_late(queue)
        if len(queue) >= self.setup.queue_size:
            self.fail(image, "QueueFull")
            return
        queue.append(image)
        self.dispatch()

    def _drop_late(self, queue: deque[VirtualImage]) -> None:
        late = [image for image in queue if image.deadline < self.clock.now]
        for image in late:
            queue.remove(image)
            self.fail(image, "DeadlineExceeded")

    def next(self) -> VirtualImage | None:
        """Take the next request from the queue."""
        for queue in self._queue:
            while queue:
                image = queue.popleft()
                if image.deadline >= self.clock.now:
                    return image
                self.fail(image, "DeadlineExceeded")
        return None

    def take_equal(self, image: VirtualImage, count: int) -> list[VirtualImage]:
        """Take up to `count` more requests of the same size, rows and steps from the queue."""
        alike: list[VirtualImage] = []
        for queue in self._queue:
            for other in list(queue):
                equal = (other.size, other.batch_rows, other.steps) == (image.size, image.batch_rows, image.steps)
                if equal and len(alike) < count and other.deadline >= self.clock.now:
                    queue.remove(other)
                    alike.append(other)
        return alike

    def dispatch(self) -> None:
        """Let instances return from ``execute()``, and give them what waits; call it after every change."""
        while True:
            if self._executing:
                self._return_from_execute()
            if not self._free or not any(self._queue):
                return
            image = self.next()
            if image is None:
                return
            instance = self._free.popleft()
            instance.granted -= 1
            instance.margin = work = float(image.cost * image.steps)
            instance.load += work
            self._taken = self.clock.now
            self._busy_taken_s = sum(other.busy_s for other in self.instances)
            self._executing.append(instance)
            instance.submit(image)

    def _return_from_execute(self) -> None:
        """`Instance.wait_for_slot` and `Balance.should_yield`, with every backlog known at once."""
        least, second = sys.float_info.max, sys.float_info.max
        for other in self.instances:
            if other.granted > 0:
                if other.load < least:
                    least, second = other.load, least
                elif other.load < second:
                    second = other.load
        if least == sys.float_info.max:
            return
        still = []
        for instance in self._executing:
            if instance.granted > 0:
                rival = second if instance.load == least else least
                if not instance.load or rival >= max(instance.load - instance.margin, sys.float_info.min):
                    self._free.append(instance)
                    continue
            still.append(instance)
        self._executing = still

    def fail(self, image: VirtualImage, error: str) -> None:
        """Answer a request with an error."""
        self._answer(image, error, instance="")

    def done(self, image: VirtualImage, instance: Instance) -> None:
        """Answer a request with an image."""
        self._answer(image, "", instance=instance.name)

    def _answer(self, image: VirtualImage, error: str, *, instance: str) -> None:
        arrival = image.arrival
        own_s = arrival.own_s(self.setup.device)
        deadline_s = None if arrival.scale is None else arrival.scale * own_s
        self.outcomes[image.index] = Outcome(
            arrived=arrival.at,
            latency_s=self.clock.now - arrival.at,
            own_s=own_s,
            deadline_s=deadline_s,
            steps=arrival.steps,
            error=error,
            instance=instance,
        )
        if self._later:
            self.clock.at(self.clock.now, self._arrive, *self._later.popleft())
