"""Loads of `simulated.traffic` against real servers, with one client, and what became of their requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from common.figures import Outcome
from genserve import AsyncClient, GenServeError, Priority
from simulated.device import Device
from simulated.traffic import Arrival

PRIORITIES: dict[int, Priority] = {1: "high", 2: "normal", 3: "low"}
PATIENCE_S = 600.0
"""Timeout of requests without a deadline; servers may have a shorter one."""


async def _ask(client: AsyncClient, index: int, arrival: Arrival, device: Device, started: float) -> Outcome:
    own_s = arrival.own_s(device)
    deadline_s = None if arrival.scale is None else arrival.scale * own_s
    asked = time.monotonic()
    error, instance = "", ""
    try:
        image = await client.generate(
            f"picture {index}",
            negative_prompt="rain" if arrival.guided else None,
            height=arrival.size,
            width=arrival.size,
            steps=arrival.steps,
            seed=index,
            priority=PRIORITIES[arrival.level],
            timeout=PATIENCE_S if deadline_s is None else deadline_s,
        )
        instance = str(image.info["instance"])
    except GenServeError as raised:
        error = type(raised).__name__
    ended = time.monotonic()
    return Outcome(asked - started, ended - asked, own_s, deadline_s, arrival.steps, error, instance)


async def _replay(urls: Sequence[str], load: Sequence[Arrival], device: Device, in_flight: int | None) -> list[Outcome]:
    async with AsyncClient(list(urls)) as client:
        await client.generate("a connection", height=64, width=64, steps=1)
        places = asyncio.Semaphore(in_flight or len(load))
        started = time.monotonic()

        async def ask(index: int, arrival: Arrival) -> Outcome:
            if in_flight is None:
                await asyncio.sleep(max(0.0, started + arrival.at - time.monotonic()))
            async with places:
                return await _ask(client, index, arrival, device, started)

        return await asyncio.gather(*(ask(index, arrival) for index, arrival in enumerate(load)))


def replay_on(
    urls: Sequence[str], load: Sequence[Arrival], device: Device, *, in_flight: int | None = None
) -> list[Outcome]:
    """Send the requests of a load at their times, and return what became of them.

    Args:
        urls: Servers.
        load: The requests, by their times.
        device: Device of the servers, for own times and deadlines.
        in_flight: Keep so many in flight, whatever their times.
    """
    return asyncio.run(_replay(urls, load, device, in_flight))
