"""Load balance and concurrency efficiency of many simulated devices: real servers, and the virtual clock.

A device takes a fixed time per row, so batches gain nothing, and the work of the requests is what the devices have to
do. Efficiency is that work over what they could have done in the run; what is missing is split into what was lost until
an instance took the last request, and the end, at which devices run dry one after the other. With --check it fails if a
promise does not hold.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from rich import box

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import COUNT, SETTINGS, fail, judge, new_table, show
from common.figures import Outcome, concurrency_efficiency, failures, load_balance
from genserve import GenServeError
from genserve.serve.options import ServeError
from simulated.device import Device
from simulated.fleet import fleet
from simulated.replayed import replay_on
from simulated.traffic import Arrival, Mix, at_once, draw_load
from simulated.virtual import Setup, simulate

LEAST_BALANCE, LEAST_EFFICIENCY = 0.97, 0.95
SERVER, VIRTUAL = "server", "virtual clock"


@dataclass(frozen=True)
class Result:
    """Figures of one run."""

    clock: str
    devices: int
    requests: int
    balance: float
    efficiency: float
    lost_before: float | None
    """Share lost until the last request was taken; only the virtual clock knows."""
    failed: int


def summarize(
    clock: str,
    devices: int,
    load: Sequence[Arrival],
    device: Device,
    outcomes: Sequence[Outcome],
    lost_before: float | None = None,
) -> Result:
    """Return the figures of a run."""
    work: Counter[str] = Counter()
    for arrival, outcome in zip(load, outcomes, strict=True):
        if not outcome.error:
            work[outcome.instance] += arrival.device_s(device)  # type: ignore[assignment]
    shares = [*work.values(), *[0.0] * (devices - len(work))]
    first = min(outcome.arrived for outcome in outcomes)
    seconds = max(outcome.arrived + outcome.latency_s for outcome in outcomes) - first
    return Result(
        clock,
        devices,
        len(load),
        load_balance(shares),
        concurrency_efficiency(sum(shares), devices, seconds),
        lost_before,
        failures(outcome.error for outcome in outcomes).total(),
    )


def run_virtual(devices: int, load: Sequence[Arrival], device: Device, in_flight: int) -> Result:
    """Run a load on the virtual clock."""
    ran = simulate(load, Setup(device, devices, queue_size=in_flight), in_flight=in_flight)
    # Steps that run at that moment are counted to their ends.
    lost = max(0.0, devices * ran.taken_s - ran.busy_taken_s) / (devices * ran.seconds)
    return summarize(VIRTUAL, devices, load, device, ran.outcomes, lost)


def run_server(devices: int, load: Sequence[Arrival], step_s: float, in_flight: int) -> Result:
    """Run a load on a real server."""
    device = Device.per_row(step_s)
    with fleet([step_s], instances=devices, environment={"MAX_GLOBAL_QUEUE_SIZE": str(in_flight)}) as (server,):
        outcomes = replay_on([server.url("grpc")], load, device, in_flight=in_flight)
    return summarize(SERVER, devices, load, device, outcomes)


def broken_promises(results: Sequence[Result]) -> list[str]:
    """Return the promises that do not hold."""
    broken = []
    for result in results:
        name = f"{result.devices} devices, {result.clock}"
        if result.failed:
            broken.append(f"{name}: {result.failed} requests failed")
        if result.balance < LEAST_BALANCE and result.clock == SERVER:
            broken.append(f"{name}: load balance {result.balance:.3f}, promised {LEAST_BALANCE}")
        if result.efficiency < LEAST_EFFICIENCY:
            broken.append(f"{name}: efficiency {result.efficiency:.3f}, promised {LEAST_EFFICIENCY}")
    return broken


@click.command(context_settings=SETTINGS)
@click.option("--server", "on_server", type=COUNT, multiple=True, help="Devices behind a real server.  [default: 4]")
@click.option("--virtual", "on_clock", type=COUNT, multiple=True, help="On the virtual clock.  [default: 4, 16, 64]")
@click.option("--requests", type=COUNT, default=100, show_default=True, help="For each device.")
@click.option("--step-s", type=click.FloatRange(0.001), default=0.02, show_default=True, help="Seconds per row.")
@click.option("--check", is_flag=True, help="Fail if a promise does not hold.")
def main(on_server: tuple[int, ...], on_clock: tuple[int, ...], requests: int, step_s: float, check: bool) -> None:
    """Measure the load balance and the efficiency of simulated devices."""
    device, mix = Device.per_row(step_s), Mix.load("steps")
    results = []
    try:
        for clock, devices in [(SERVER, each) for each in on_server or (4,)] + [
            (VIRTUAL, each) for each in on_clock or (4, 16, 64)
        ]:
            load = draw_load(mix, at_once(requests * devices), random.Random(0))
            in_flight = 25 * devices
            run = (
                run_server(devices, load, step_s, in_flight)
                if clock == SERVER
                else run_virtual(devices, load, device, in_flight)
            )
            results.append(run)
    except (ServeError, GenServeError) as error:
        fail(error)
    drawn = new_table("Clock", "Devices", "Requests", "Load balance", "Efficiency", "Lost before the end", "At the end")
    drawn.box = box.MARKDOWN
    for each in results:
        before = "" if each.lost_before is None else f"{each.lost_before:.1%}"
        end = "" if each.lost_before is None else f"{1 - each.efficiency - each.lost_before:.1%}"
        figures = f"{each.balance:.3f}", f"{each.efficiency:.3f}"
        drawn.add_row(each.clock, str(each.devices), str(each.requests), *figures, before, end)
    show(drawn, f"Simulated devices of {step_s:g} s a row, {mix.name}, 25 requests in flight for each")
    judge(broken_promises(results), check=check)


if __name__ == "__main__":
    main()
