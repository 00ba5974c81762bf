"""The virtual clock against the real server with the same simulated devices, on the same load.

The server is real: Triton, its stubs, the workers and the engine; only the device's times come from a table. The same
requests then run on the virtual clock. With --check it fails if the two differ by more than promised.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click
from rich import box

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import COUNT, SETTINGS, fail, judge, new_table, show
from common.figures import Outcome, goodput, percentile
from genserve import GenServeError
from genserve.serve.options import ServeError
from genserve_backend.flux.request import PIXELS_PER_TOKEN
from simulated.device import Device, TableError
from simulated.fleet import fleet
from simulated.replayed import replay_on
from simulated.traffic import Arrival, Mix, draw_load, mixes, poisson
from simulated.virtual import BASELINES, Setup, contenders, simulate

LARGEST_DIFFERENCE = 0.05
DEMO_TOKENS = 128 * 128 // PIXELS_PER_TOKEN
"""Image tokens of the native size of the demo's checkpoint, by which a server without images estimates the next."""
ENGINE_POLICIES = tuple(name for name in contenders() if name not in BASELINES)

FIGURES: dict[str, Callable[[Sequence[Outcome]], float]] = {
    "mean latency, s": lambda outcomes: statistics.fmean(each.latency_s for each in outcomes),
    "median latency, s": lambda outcomes: percentile((each.latency_s for each in outcomes), 50),
    "90th percentile, s": lambda outcomes: percentile((each.latency_s for each in outcomes), 90),
    "requests in time, %": lambda outcomes: 100 * goodput(outcomes),
    "length of the run, s": lambda outcomes: max(each.arrived + each.latency_s for each in outcomes),
}


def measure(device: str, instances: int, policy: str, load: Sequence[Arrival]) -> tuple[list[Outcome], list[Outcome]]:
    """Return what became of a load's requests: on the real server, and on the virtual clock."""
    table = Device.load(device)
    with fleet([device], instances=instances, environment={"FLUX_POLICY": policy}) as (server,):
        real = replay_on([server.url("grpc")], load, table)
    return real, simulate(load, Setup(table, instances, policy, usual_tokens=DEMO_TOKENS)).outcomes


def broken_promises(pairs: dict[str, tuple[float, float]]) -> list[str]:
    """Return the figures that differ by more than promised."""
    return [
        f"{title}: {real:.3g} on the server, {virtual:.3g} on the virtual clock; promised within "
        f"{LARGEST_DIFFERENCE:.0%}"
        for title, (real, virtual) in pairs.items()
        if abs(virtual - real) > LARGEST_DIFFERENCE * real
    ]


@click.command(context_settings=SETTINGS)
@click.option("--device", default="h100@0.5", show_default=True, help="As in NAME or NAME@FACTOR.")
@click.option("--instances", type=COUNT, default=4, show_default=True)
@click.option("--policy", "policies", type=click.Choice(ENGINE_POLICIES), multiple=True, help="[default: all]")
@click.option("--mix", type=click.Choice(mixes()), default="steps", show_default=True)
@click.option("--load", "share", type=click.FloatRange(0.01), default=0.9, show_default=True)
@click.option("--scale", type=click.FloatRange(1), help="Deadlines as multiples of own times.  [default: none]")
@click.option("--seconds", type=click.FloatRange(10), default=90.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--check", is_flag=True, help="Fail if a promise does not hold.")
def main(
    device: str,
    instances: int,
    policies: tuple[str, ...],
    mix: str,
    share: float,
    scale: float | None,
    seconds: float,
    seed: int,
    check: bool,
) -> None:
    """Run the same load on the real server with simulated devices, and on the virtual clock."""
    drawn = new_table("Policy", "Figure", "Server", "Virtual clock", "Difference")
    drawn.box = box.MARKDOWN
    broken = []
    try:
        table, requests, draw = Device.load(device), Mix.load(mix), random.Random(seed)
        rate = share * instances / requests.mean_device_s(table)
        load = draw_load(requests, poisson(rate, draw), draw, seconds=seconds, scale=scale)
        for policy in policies or ENGINE_POLICIES:
            real, virtual = measure(device, instances, policy, load)
            pairs = {title: (figure(real), figure(virtual)) for title, figure in FIGURES.items()}
            for title, (on_server, on_clock) in pairs.items():
                difference = f"{on_clock / on_server - 1:+.1%}"
                drawn.add_row(policy, title, f"{on_server:.3f}", f"{on_clock:.3f}", difference)
            broken += [f"{policy}: {line}" for line in broken_promises(pairs)]
    except (ServeError, GenServeError, TableError) as error:
        fail(error)
    within = f", deadlines of {scale:g} own times" if scale else ""
    show(drawn, f"Simulated: {instances} x {table.name}, {requests.name}, load {share:g}, {len(load)} requests{within}")
    judge(broken, check=check)


if __name__ == "__main__":
    main()
