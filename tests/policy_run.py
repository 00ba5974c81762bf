"""Policies on a simulated device with a virtual clock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from genserve_backend.flux.policy.base import Limits, Policy

FOREVER = 1e9


@dataclass(eq=False)
class PlainImage:
    """An image without latents. Times are in seconds of the virtual clock."""

    name: str = ""
    steps: int = 10
    tokens: int = 100
    batch_rows: int = 1
    level: int = 2
    arrived: float = 0.0
    within_s: float | None = None
    """Seconds from the arrival to a deadline of its own."""
    waited_s: float = 0.0
    has_started: bool = False
    has_slot: bool = False
    step: int = 0
    ran_at: int = 0
    ran: list[int] = field(default_factory=list)
    done_at: float | None = None

    @property
    def deadline(self) -> float:
        return self.arrived + (FOREVER if self.within_s is None else self.within_s)

    @property
    def has_own_deadline(self) -> bool:
        return self.within_s is not None

    @property
    def cost(self) -> int:
        return self.tokens * self.batch_rows

    @property
    def steps_left(self) -> int:
        return self.steps - self.step

    @property
    def is_met(self) -> bool:
        return self.done_at is not None and self.done_at <= self.deadline


@dataclass(frozen=True)
class LinearCosts:
    """Times that grow with the tokens of a forward: by default 1 s for 100 tokens, however they are batched."""

    start_s: float = 0.0
    token_s: float = 0.01
    around_s: float = 0.0
    """Seconds of an encoding, and of a decoding."""
    are_known: bool = True

    def step_s(self, batch_rows: int, tokens: int) -> float:
        return self.start_s + self.token_s * batch_rows * tokens

    def has_measured(self, batch_rows: int, tokens: int) -> bool:
        return True

    def encode_s(self) -> float:
        return self.around_s

    def decode_s(self, tokens: int) -> float:
        return self.around_s


def limits(max_running: int = 16, max_tokens: int = 10_000, max_padding: float = 0.0) -> Limits:
    return Limits(max_running=max_running, max_tokens=max_tokens, max_padding=max_padding)


def simulate(
    policy: Policy,
    images: Iterable[PlainImage],
    *,
    costs: LinearCosts,
    max_tokens: int = 10_000,
    until: float = FOREVER,
) -> list[str]:
    """Run images to their end, or past their deadlines; return the names of the images of each forward."""
    coming = sorted(images, key=lambda image: image.arrived)
    held: list[PlainImage] = []
    batches: list[str] = []
    now = admitted_at = 0.0
    while (coming or held) and now < until:
        if not held:
            now = max(now, coming[0].arrived)
        while coming and coming[0].arrived <= now:
            image = coming.pop(0)
            image.ran_at = len(batches)
            held.append(image)
        refused = policy.refused([image for image in held if not image.has_started], now)
        held = [image for image in held if image not in refused and now <= image.deadline]
        for image in held:
            image.waited_s += 0.0 if image.has_slot else now - max(admitted_at, image.arrived)
        admitted_at = now
        running, waiting = policy.assign(held, now)
        for image in running:
            image.has_started = image.has_slot = True
        for image in waiting:
            image.has_slot = False
        if not running:
            continue
        tick = len(batches)
        batch = policy.choose(running, waiting, tick=tick, now=now, max_tokens=max_tokens)
        now += costs.step_s(sum(image.batch_rows for image in batch), max(image.tokens for image in batch))
        batches.append("".join(image.name for image in batch))
        for image in batch:
            image.step += 1
            image.ran_at = tick + 1
            image.ran.append(tick)
            if not image.steps_left:
                image.done_at = now
                held.remove(image)
    return batches
