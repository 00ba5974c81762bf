"""The engine's turns and its decoder on a virtual clock, with the product's own intake and policies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from genserve_backend.flux.admission import Intake
from genserve_backend.flux.policy import make_policy
from genserve_backend.flux.policy.base import Policy
from genserve_backend.flux.policy.costs import MeasuredCosts
from genserve_backend.settings import FluxSettings
from simulated.traffic import HANDOFF_S
from simulated.virtual.instances import Instance, Server
from simulated.virtual.parts import VirtualImage


class EngineInstance(Instance):
    """The engine's turns (`flux/engine.py`) and its decoder (`flux/decode.py`)."""

    def __init__(self, front: Server, number: int) -> None:
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
