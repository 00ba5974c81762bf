"""Goodput of the policies with the demo's checkpoint behind a real server, next to the virtual clock.

Nothing is simulated in the first column: Triton, the worker and the engine run the demo's checkpoint on this machine's
CPU. The second column is the virtual clock with the device's table that `perf/simulated/measure.py` has measured on the
same machine. With --check it fails if the two order the policies differently.

It needs an idle machine: deadlines are multiples of the measured own times.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import click
from rich import box

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import COUNT, SETTINGS, fail, judge, new_table, show
from common.figures import Interval, goodput, interval
from genserve import GenServeError
from genserve.serve.options import ServeError
from genserve.serve.own_server import own_server
from genserve_backend.flux.request import PIXELS_PER_TOKEN
from simulated.device import Device, TableError
from simulated.replayed import replay_on
from simulated.traffic import Arrival, Mix, draw_load, mixes, poisson
from simulated.virtual import BASELINES, Setup, contenders, simulate

POLICIES = tuple(name for name in contenders() if name not in BASELINES)
NATIVE_TOKENS = 128 * 128 // PIXELS_PER_TOKEN
WARM_UP = 24
"""Requests before the load: kernels are chosen, and `slack` knows the times of the forwards."""


@dataclass(frozen=True)
class Shares:
    """Shares of requests in time of one policy."""

    real: Interval
    virtual: Interval


def measure(policy: str, loads: Sequence[Sequence[Arrival]], mix: Mix, device: Device) -> Shares:
    """Return the shares of one policy, over all loads."""
    warm_up = [mix.draw(random.Random(number), 0.0) for number in range(WARM_UP)]
    with (
        tempfile.TemporaryDirectory(prefix="genserve-goodput-") as folder,
        own_server(("flux",), log=Path(folder) / "server.log", environment={"FLUX_POLICY": policy}) as addresses,
    ):
        replay_on([addresses["grpc"]], warm_up, device, in_flight=4)
        real = [goodput(replay_on([addresses["grpc"]], load, device)) for load in loads]
    setup = Setup(device, 1, policy, usual_tokens=NATIVE_TOKENS)
    return Shares(interval(real), interval([goodput(simulate(load, setup).outcomes) for load in loads]))


def broken_promises(shares: dict[str, Shares], tie: float) -> list[str]:
    """Return the pairs of policies that the two clocks order differently, unless one of them sees a tie."""
    broken = []
    for one, other in combinations(shares, 2):
        real = shares[one].real.mean - shares[other].real.mean
        virtual = shares[one].virtual.mean - shares[other].virtual.mean
        if real * virtual < 0 and min(abs(real), abs(virtual)) > tie:
            broken.append(f"{one} against {other}: {real:+.1%} on the server, {virtual:+.1%} on the virtual clock")
    return broken


@click.command(context_settings=SETTINGS)
@click.option("--device", default="demo-cpu", show_default=True, help="A table measured on this machine.")
@click.option("--mix", "name", type=click.Choice(mixes()), default="demo", show_default=True)
@click.option("--load", "share", type=click.FloatRange(0.01), default=0.9, show_default=True)
@click.option("--scale", type=click.FloatRange(1), default=2.0, show_default=True, help="Deadline over own time.")
@click.option("--seconds", type=click.FloatRange(10), default=60.0, show_default=True, help="Length of a load.")
@click.option("--seeds", type=COUNT, default=3, show_default=True, help="Loads of each policy.")
@click.option("--tie", type=click.FloatRange(0), default=0.03, show_default=True, help="Difference that is no order.")
@click.option("--check", is_flag=True, help="Fail if the two order the policies differently.")
def main(
    device: str, name: str, share: float, scale: float, seconds: float, seeds: int, tie: float, check: bool
) -> None:
    """Measure the policies on a real server, and on the virtual clock."""
    shares = {}
    try:
        table, mix = Device.load(device), Mix.load(name)
        rate = share / mix.mean_device_s(table)
        loads = []
        for seed in range(seeds):
            draw = random.Random(seed)
            loads.append(draw_load(mix, poisson(rate, draw), draw, seconds=seconds, scale=scale))
        for policy in POLICIES:
            shares[policy] = measure(policy, loads, mix, table)
    except (ServeError, GenServeError, TableError) as error:
        fail(error)
    drawn = new_table("Policy", "Server", "Simulated")
    drawn.box = box.MARKDOWN
    for policy, each in shares.items():
        drawn.add_row(policy, f"{each.real:.1%}", f"{each.virtual:.1%}")
    requests = sum(map(len, loads))
    show(
        drawn, f"In time at {scale:g} own times: {mix.name}, load {share:g}, {rate:.1f} requests/s, {requests} requests"
    )
    judge(broken_promises(shares, tie), check=check)


if __name__ == "__main__":
    main()
