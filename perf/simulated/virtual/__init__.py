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

from collections.abc import Sequence

from genserve_backend.flux.policy import POLICIES
from simulated.traffic import Arrival
from simulated.virtual.front import KINDS, Front
from simulated.virtual.parts import Ran, Setup

__all__ = ["BASELINES", "Ran", "Setup", "contenders", "simulate"]

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
