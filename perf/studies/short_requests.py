"""Short requests among long ones on simulated devices: latency percentiles next to static batches and a lock.

Runs on a virtual clock. The load is a share of the saturation, the requests per second that a policy makes of a
backlog: the lowest of static batches' and ours. With --check it fails if a promise does not hold.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich import box

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import COUNT, SETTINGS, fail, judge, new_table, show
from common.figures import Interval, interval, percentile
from simulated.device import Device, TableError
from simulated.traffic import Mix, at_once, draw_load, mixes, poisson
from simulated.virtual import Setup, contenders, simulate

OURS = ("urgency", "slack")
STATIC = "static"
PERCENTS = (50, 95, 99)
LARGEST_RATIO = 0.5
"""Promised p99 of the shortest requests, of that of static batches."""
BACKLOG = 200
"""Requests for each device, of which the saturation is measured."""
FOREVER_S = 1e9


def saturation(device: Device, instances: int, policy: str, mix: Mix) -> float:
    """Return the requests per second of a policy with a backlog."""
    load = draw_load(mix, at_once(BACKLOG * instances), random.Random(0))
    setup = Setup(device, instances, policy, queue_size=len(load), timeout_s=FOREVER_S)
    ran = simulate(load, setup)
    taken = sum(each.arrived + each.latency_s <= ran.taken_s for each in ran.outcomes)
    return taken / ran.taken_s


def latencies(
    device: Device, instances: int, policy: str, mix: Mix, *, rate: float, seconds: float, seed: int
) -> tuple[list[float], list[float]]:
    """Return the latencies of the requests with the fewest steps, and of all requests."""
    draw = random.Random(seed)
    load = draw_load(mix, poisson(rate, draw), draw, seconds=seconds)
    setup = Setup(device, instances, policy, queue_size=len(load), timeout_s=FOREVER_S)
    outcomes = simulate(load, setup).outcomes
    fewest = min(steps for steps, _ in mix.steps)
    return [each.latency_s for each in outcomes if each.steps == fewest], [each.latency_s for each in outcomes]


def broken_promises(short: dict[str, Interval], policies: Sequence[str]) -> list[str]:
    """Return the promises that do not hold; `short` has the p99 of the shortest requests by policy."""
    return [
        f"{policy}: p99 {short[policy].mean:.2f} s, {short[policy].mean / short[STATIC].mean:.2f} of static batches', "
        f"promised {LARGEST_RATIO}"
        for policy in OURS
        if policy in policies and short[policy].mean > LARGEST_RATIO * short[STATIC].mean
    ]


@click.command(context_settings=SETTINGS)
@click.option("--device", default="h100", show_default=True, help="A table of perf/simulated/devices, or a path.")
@click.option("--instances", type=COUNT, default=8, show_default=True, help="Simulated devices.")
@click.option("--mix", "name", type=click.Choice(mixes()), default="steps", show_default=True)
@click.option("--load", "share", type=click.FloatRange(0.01, 1), default=0.9, show_default=True, help="Of saturation.")
@click.option("--seconds", type=click.FloatRange(60), default=1800.0, show_default=True, help="Length of a load.")
@click.option("--seeds", type=COUNT, default=5, show_default=True, help="Runs of each case.")
@click.option("--check", is_flag=True, help="Fail if a promise does not hold.")
def main(device: str, instances: int, name: str, share: float, seconds: float, seeds: int, check: bool) -> None:
    """Simulate latencies of short requests at a share of saturation."""
    policies = contenders()
    try:
        table, mix = Device.load(device), Mix.load(name)
    except TableError as error:
        fail(error)
    most = {policy: saturation(table, instances, policy, mix) for policy in policies}
    rate = share * min(most[policy] for policy in (*OURS, STATIC) if policy in most)
    fewest = min(steps for steps, _ in mix.steps)
    drawn = new_table(
        "Policy", "Saturation, 1/s", *(f"{fewest} steps, p{percent}, s" for percent in PERCENTS), "All, p99, s"
    )
    drawn.box = box.MARKDOWN
    short = {}
    for policy in policies:
        if rate >= most[policy]:  # its queue would grow for ever
            drawn.add_row(policy, f"{most[policy]:.2f}", *["saturated"] * (len(PERCENTS) + 1))
            continue
        runs = [
            latencies(table, instances, policy, mix, rate=rate, seconds=seconds, seed=seed) for seed in range(seeds)
        ]
        of_short = [interval([percentile(short_ones, percent) for short_ones, _ in runs]) for percent in PERCENTS]
        of_all = interval([percentile(all_ones, 99) for _, all_ones in runs])
        short[policy] = of_short[-1]
        drawn.add_row(policy, f"{most[policy]:.2f}", *(f"{each:.2f}" for each in (*of_short, of_all)))
    show(
        drawn,
        f"{instances} simulated devices ({table.name}), {mix.name}, {rate:.2f} requests/s, {share:g} of saturation",
    )
    judge(broken_promises(short, policies), check=check)


if __name__ == "__main__":
    main()
