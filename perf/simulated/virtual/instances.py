"""An instance behind Triton's queue, and the baselines: a lock, and static batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from simulated.traffic import HANDOFF_S
from simulated.virtual.parts import Clock, Setup, VirtualImage

WRITERS = 2


class Server(Protocol):
    """The part of the server in front of an instance."""

    setup: Setup
    clock: Clock

    def dispatch(self) -> None:
        """Give waiting requests to instances with room."""

    def take_equal(self, image: VirtualImage, count: int) -> list[VirtualImage]:
        """Take up to `count` more requests of the same size, rows and steps from the queue."""

    def fail(self, image: VirtualImage, error: str) -> None:
        """Answer a request with an error."""

    def done(self, image: VirtualImage, instance: Instance) -> None:
        """Answer a request with an image."""


class Instance(ABC):
    """An instance behind Triton's queue.

    Args:
        front: Gives requests and takes answers.
        number: Of the instance.
    """

    def __init__(self, front: Server, number: int) -> None:
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
