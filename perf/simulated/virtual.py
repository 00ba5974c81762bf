"""Triton, several instances and their devices on a virtual clock, which runs hours in seconds. No torch.

The decisions are the product's own code: `Intake` grants requests, a policy assigns slots and chooses forwards, and
learns the times of forwards as it does in a server. This module has what surrounds them: Triton's queue with its
levels, limit and timeouts, the choice between instances (`adapter/balance.py`) with all backlogs known at once, the
turns of the engine, and the decoder. A request takes `HANDOFF_S` from Triton's queue to the engine; other times of the
server are left out. Decodings and steps share a device, one after the other; files are written beside it.

Baselines take the places of engines behind the same queue: `LockInstance` runs one request at a time, `StaticInstance`
batches of equal size and steps, formed when the device is free, whose images leave together.
"""

from __future__ import annotations

import heapq
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.figures import TOLERANCE, Outcome
from genserve_backend.flux.admission import Intake
from genserve_backend.flux.policy import POLICIES, make_policy
from genserve_backend.flux.policy.base import Policy
from genserve_backend.flux.policy.costs import MeasuredCosts
from genserve_backend.settings import FluxSettings
from simulated.device import Device
from simulated.traffic import HANDOFF_S, Arrival

TASK_TIMEOUT_S = 240.0
QUEUE_SIZE = 150
"""Of each level."""
LEVELS = 3
WRITERS = 2


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


class Instance(ABC):
    """An instance behind Triton's queue.

    Args:
        front: Gives requests and takes answers.
        number: Of the instance.
    """

    def __init__(self, front: Front, number: int) -> None:
        self.front = front
        self.name = f"flux_0_{number}"
        self.granted = 0
        """Requests that it may still take."""
        self.load = 0.0
        """Work of its requests."""
        self.margin = 0.0
        """Work of the last one."""
        self.busy_s = 0.0
        self._writers = [0.0] * WRITERS

    @abstractmethod
    def start(self) -> None:
        """Ask for the first requests."""

    @abstractmethod
    def submit(self, image: VirtualImage) -> None:
        """Take a request."""

    def _work(self, seconds: float) -> float:
        self.busy_s += seconds
        return seconds

    def _write(self, image: VirtualImage, at: float) -> None:
        """Write the file of an image that is decoded at a time, then answer."""
        writer = self._writers.index(min(self._writers))
        ends = max(at, self._writers[writer]) + self.front.setup.device.file_s(image.tokens)
        self._writers[writer] = ends
        self.front.clock.at(ends, self._answer, image)

    def _answer(self, image: VirtualImage) -> None:
        self.front.done(image, self)


class EngineInstance(Instance):
    """The engine's turns (`flux/engine.py`) and its decoder (`flux/decode.py`)."""

    def __init__(self, front: Front, number: int) -> None:
        super().__init__(front, number)
        setup = front.setup
        self._costs = MeasuredCosts(text_tokens=setup.device.text_tokens)
        settings = FluxSettings.model_validate(
            {
                "model_path": Path(),
                "policy": setup.policy,
                "max_running": setup.max_running,
                "max_batched_tokens": setup.max_tokens,
            }
        )
        self._policy: Policy = make_policy(settings, setup.device.kind, self._costs)
        self._intake = Intake(
            max_running=setup.max_running,
            max_tokens=setup.max_tokens,
            max_waiting=setup.max_waiting,
            usual_cost=setup.usual_tokens,
        )
        self._inbox: list[VirtualImage] = []
        self._images: list[VirtualImage] = []
        self._running: list[VirtualImage] = []
        self._waiting: list[VirtualImage] = []
        self._tick = 0
        self._admitted_at = 0.0
        self._idle = True
        self._decoding = 0
        self._device_free = 0.0

    def start(self) -> None:
        """Ask for the first requests."""
        self._grant()

    def submit(self, image: VirtualImage) -> None:
        """Take a request."""
        self.front.clock.at(self.front.clock.now + HANDOFF_S, self._receive, image)

    def _receive(self, image: VirtualImage) -> None:
        image.arrived = self.front.clock.now
        self._inbox.append(image)
        if self._idle:
            self._idle = False
            self._turn()

    def _grant(self) -> None:
        if self._decoding <= self.front.setup.max_running:
            count = self._intake.grant(self._running, self._waiting, tick=self._tick)
            if count:
                self.granted += count
                self.front.dispatch()

    def _turn(self) -> None:
        """Receive, drop, admit, and start the next forward; its end begins the next turn."""
        now = self.front.clock.now
        new = self._inbox
        if new:
            self._inbox = []
            for image in new:
                self._intake.arrived()
                image.ran_at = self._tick
            self._images += new
        self._drop(now)
        self._admit(now)
        if not self._running:
            self._idle = True
            self._grant()  # the next turn begins with it, then waits
            return
        start = max(now, self._device_free)
        newcomers = [image for image in self._running if not image.has_started]
        if newcomers:
            encode_s = self._work(self.front.setup.device.encode_s(sum(image.batch_rows for image in newcomers)))
            self._costs.observe_encode(encode_s)
            start += encode_s
            for image in newcomers:
                image.has_started = image.has_slot = True
        batch = self._policy.choose(
            self._running, self._waiting, tick=self._tick, now=start, max_tokens=self.front.setup.max_tokens
        )
        self._tick += 1
        rows, longest = sum(image.batch_rows for image in batch), max(image.tokens for image in batch)
        seconds = self._work(self.front.setup.device.step_s(rows, longest))
        self._costs.observe_step(rows, longest, seconds)
        self.front.clock.at(start + seconds, self._stepped, batch)

    def _drop(self, now: float) -> None:
        late = [image for image in self._images if image.deadline < now]
        for image in late:
            self._forget(image)
            self.front.fail(image, "DeadlineExceeded")
        fresh = [image for image in self._images if not image.has_started]
        for image in self._policy.refused(fresh, now):
            self._forget(image)
            self.front.fail(image, "Refused")
            late.append(image)
        if late:
            self.front.dispatch()

    def _admit(self, now: float) -> None:
        for image in self._waiting:
            image.waited_s += now - self._admitted_at
        self._admitted_at = now
        self._running, self._waiting = self._policy.assign(self._images, now)
        for image in self._running:
            image.has_slot = image.has_started
        for image in self._waiting:
            image.has_slot = False

    def _stepped(self, batch: Sequence[VirtualImage]) -> None:
        now = self.front.clock.now
        for image in batch:
            image.steps_left -= 1
            image.ran_at = self._tick
            self.load -= image.cost
            if not image.steps_left:
                self._forget(image)
                self._decode(image, now)
        self._grant()
        self.front.dispatch()
        self._turn()

    def _decode(self, image: VirtualImage, now: float) -> None:
        self._decoding += 1
        image.stepped_at = now
        seconds = self._work(self.front.setup.device.decode_s(image.tokens))
        self._device_free = max(self._device_free, now) + seconds
        self._write(image, self._device_free)

    def _answer(self, image: VirtualImage) -> None:
        self._decoding -= 1
        self._costs.observe_decode(image.tokens, self.front.clock.now - image.stepped_at)
        if image.deadline < self.front.clock.now:
            self.front.fail(image, "DeadlineExceeded")
        else:
            self.front.done(image, self)
        if self._idle:
            self._grant()

    def _forget(self, image: VirtualImage) -> None:
        self._images.remove(image)
        self.load -= image.cost * image.steps_left
        for images in (self._running, self._waiting):
            if image in images:
                images.remove(image)


class LockInstance(Instance):
    """One request at a time, as a pipeline behind a lock. Requests leave the queue in time or not at all."""

    def start(self) -> None:
        """Ask for the first request."""
        self.granted = 1
        self.front.dispatch()

    def submit(self, image: VirtualImage) -> None:
        """Run a request, and others with it."""
        batch = [image, *self._others(image)]
        device, clock = self.front.setup.device, self.front.clock
        rows, tokens = sum(each.batch_rows for each in batch), image.tokens
        seconds = device.encode_s(rows) + image.steps * device.step_s(rows, tokens)
        seconds += len(batch) * device.decode_s(tokens)
        clock.at(clock.now + HANDOFF_S + self._work(seconds), self._end, batch)

    def _others(self, image: VirtualImage) -> Sequence[VirtualImage]:
        return ()

    def _end(self, batch: Sequence[VirtualImage]) -> None:
        now = self.front.clock.now
        for image in batch:
            self._write(image, now)
        self.load = 0.0
        self.granted = 1
        self.front.dispatch()


class StaticInstance(LockInstance):
    """A batch of all waiting requests of the first one's size and steps; nobody joins, and all leave together."""

    def _others(self, image: VirtualImage) -> Sequence[VirtualImage]:
        setup = self.front.setup
        room = min(setup.max_running, max(1, setup.max_tokens // image.cost)) - 1
        return self.front.take_equal(image, room) if room else ()


KINDS: dict[str, type[Instance]] = {"lock": LockInstance, "static": StaticInstance}
BASELINES = tuple(KINDS)


def simulate(load: Sequence[Arrival], setup: Setup, *, in_flight: int | None = None) -> Ran:
    """Run a load on a virtual clock, and return what became of its requests.

    Args:
        load: The requests, by their times.
        setup: Settings.
        in_flight: Keep so many in flight, whatever their times.
    """
    return Front(setup).run(load, in_flight=in_flight)


def contenders() -> list[str]:
    """Return the names that `Setup.policy` takes."""
    return [*POLICIES, *BASELINES]
