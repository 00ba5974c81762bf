"""Goodput against deadlines on simulated devices: the share of requests that meet a multiple of their own time.

Runs on a virtual clock with the product's own policies and intake, next to a lock and static batches. A deadline is a
multiple of the request's own time, its time alone on the device. The load is the own device time of the requests that
arrive in a second, over the devices: 1.0 keeps all devices busy if nothing is gained by batches. Then the same loads
without deadlines give the slowdowns, latencies over own times. With --check it fails if a promise does not hold.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
from rich import box

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import COUNT, SETTINGS, fail, judge, new_table, show
from common.figures import Interval, goodput, interval, percentile
from common.plots import Panel, line_plot
from simulated.device import Device, TableError
from simulated.traffic import Mix, TraceError, bursts, draw_load, mixes, poisson, read_trace, replay, window
from simulated.virtual import Setup, contenders, simulate

SCALES = (1.0, 1.1, 1.2, 1.5, 2.0)
OURS, STATIC = "slack", "static"
PROMISED_SCALE, PROMISED_RATIO, PROMISED_LOAD = 1.1, 1.25, 0.9
WORST_OF_STATIC = 2.0
"""Promised worst slowdown at `PROMISED_LOAD` without deadlines, of that of static batches."""
FOREVER_S = 1e9


@dataclass(frozen=True)
class Run:
    """One simulated run. Without a scale there are no deadlines."""

    mix: str
    load: float
    policy: str
    scale: float | None
    seed: int


@dataclass(frozen=True)
class Figures:
    """Figures of a run."""

    goodput: float
    slow_99: float
    slow_worst: float


@dataclass(frozen=True)
class Plan:
    """Settings that all runs share."""

    device: str
    instances: int
    seconds: float
    arrivals: str
    trace: Path | None

    def run(self, run: Run) -> Figures:
        """Simulate one run."""
        device, mix = Device.load(self.device), Mix.load(run.mix)
        draw = random.Random(run.seed)
        rate = run.load * self.instances / mix.mean_device_s(device)
        if self.trace:
            load = replay(read_trace(self.trace), mix, draw, rate=rate, scale=run.scale)
            start = draw.uniform(0.0, max(0.0, load[-1].at - self.seconds))
            load = window(load, start, self.seconds)
        else:
            times = bursts(rate, draw) if self.arrivals == "bursts" else poisson(rate, draw, hours=mix.hours)
            load = draw_load(mix, times, draw, seconds=self.seconds, scale=run.scale)
        setup = Setup(device, self.instances, run.policy)
        if run.scale is None:
            setup = Setup(device, self.instances, run.policy, queue_size=len(load), timeout_s=FOREVER_S)
        outcomes = simulate(load, setup).outcomes
        slowdowns = [each.slowdown for each in outcomes if not each.error]
        return Figures(goodput(outcomes), percentile(slowdowns, 99), max(slowdowns, default=math.nan))


Key = tuple[str, float, str, float | None]
Results = dict[Key, list[Figures]]


def measure(plan: Plan, runs: Sequence[Run], processes: int) -> Results:
    """Return the figures of all runs, by mix, load, policy and scale."""
    results: Results = {}
    with ProcessPoolExecutor(processes) as pool:
        for run, figures in zip(runs, pool.map(plan.run, runs, chunksize=4), strict=True):
            results.setdefault((run.mix, run.load, run.policy, run.scale), []).append(figures)
    return results


def share(results: Results, *key: object) -> Interval:
    """Return the share of requests in time."""
    return interval([each.goodput for each in results[key]])  # type: ignore[index]


def broken_promises(results: Results) -> list[str]:
    """Return the promises that do not hold."""
    broken = []
    for mix, load, policy, scale in results:
        if (mix, load, STATIC, scale) not in results:
            continue
        if (policy, load, scale) == (OURS, PROMISED_LOAD, PROMISED_SCALE):
            ours, static = share(results, mix, load, policy, scale), share(results, mix, load, STATIC, scale)
            if ours.mean < PROMISED_RATIO * static.mean:
                broken.append(
                    f"{mix}, load {load:g}, {scale:g} times the own time: {ours.mean / static.mean:.2f} times static "
                    f"batches, promised {PROMISED_RATIO}"
                )
        if (policy, load, scale) == (OURS, PROMISED_LOAD, None):
            worst, static_worst = (
                max(each.slow_worst for each in results[mix, load, name, None]) for name in (OURS, STATIC)
            )
            if worst > WORST_OF_STATIC * static_worst:
                broken.append(
                    f"{mix}, load {load:g}: worst slowdown {worst / static_worst:.2f} times static batches', promised "
                    f"{WORST_OF_STATIC:g}"
                )
    return broken


def tables(results: Results, plan: Plan, scales: Sequence[float]) -> None:
    """Print the shares and the slowdowns."""
    cases = sorted({key[:3] for key in results}, key=lambda key: list(dict.fromkeys(k[:3] for k in results)).index(key))
    title = f"{plan.instances} simulated devices ({Device.load(plan.device).name}), {plan.arrivals} arrivals"
    drawn = new_table("Sizes", "Load", "Policy", *(f"{scale:g} x" for scale in scales))
    drawn.box = box.MARKDOWN
    for mix, load, policy in cases:
        shares = (f"{share(results, mix, load, policy, scale):.1%}" for scale in scales)
        drawn.add_row(mix, f"{load:g}", policy, *shares)
    show(drawn, f"Share of requests within multiples of their own time; {title}")
    drawn = new_table("Sizes", "Load", "Policy", "Slowdown, p99", "worst")
    drawn.box = box.MARKDOWN
    for mix, load, policy in cases:
        if figures := results.get((mix, load, policy, None)):
            p99 = interval([each.slow_99 for each in figures])
            worst = max(each.slow_worst for each in figures)
            drawn.add_row(mix, f"{load:g}", policy, f"{p99:.1f}", f"{worst:.1f}")
    show(drawn, f"Latency over own time, without deadlines; {title}")


def plot(results: Results, plan: Plan, scales: Sequence[float], load: float, target: Path) -> None:
    """Draw the shares over the deadlines, a panel for each mix."""
    names = list(dict.fromkeys(key[0] for key in results))
    policies = list(dict.fromkeys(key[2] for key in results))
    panels = [
        Panel(
            f"{Mix.load(name).name}, load {load:g}",
            {policy: {scale: share(results, name, load, policy, scale) for scale in scales} for policy in policies},
        )
        for name in names
    ]
    title = f"Simulated: {plan.instances} x {Device.load(plan.device).name}, {plan.arrivals} arrivals"
    line_plot(target, panels, title=title, x="deadline / own time", y="share of requests in time", top=1.0)


def _numbers(_: click.Context, __: click.Parameter, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r}; allowed: numbers, as in 0.7,0.9") from None


def _names(known: Sequence[str], _: click.Context, __: click.Parameter, text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in known]:
        raise click.BadParameter(f"{unknown[0]!r}; allowed: {', '.join(known)}")
    return names


@click.command(context_settings=SETTINGS)
@click.option("--device", default="h100", show_default=True, help="A table of perf/simulated/devices, or a path.")
@click.option("--instances", type=COUNT, default=8, show_default=True, help="Simulated devices.")
@click.option("--mixes", "names", callback=partial(_names, mixes()), default="uniform,skewed", show_default=True)
@click.option("--loads", callback=_numbers, default="0.7,0.9,1.1", show_default=True)
@click.option("--policies", callback=partial(_names, contenders()), default=",".join(contenders()), show_default=True)
@click.option("--seconds", type=click.FloatRange(60), default=3600.0, show_default=True, help="Length of a load.")
@click.option("--seeds", type=COUNT, default=5, show_default=True, help="Runs of each case.")
@click.option("--arrivals", type=click.Choice(("poisson", "bursts")), default="poisson", show_default=True)
@click.option(
    "--trace",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Arrivals of a trace, from another moment for each seed.",
)
@click.option("--processes", type=COUNT, default=1, show_default=True)
@click.option("--plot", "target", type=click.Path(path_type=Path), help="PNG and SVG file, without the suffix.")
@click.option("--check", is_flag=True, help="Fail if a promise does not hold.")
def main(
    device: str,
    instances: int,
    names: tuple[str, ...],
    loads: tuple[float, ...],
    policies: tuple[str, ...],
    seconds: float,
    seeds: int,
    arrivals: str,
    trace: Path | None,
    processes: int,
    target: Path | None,
    check: bool,
) -> None:
    """Simulate the share of requests in time over deadlines, loads and policies."""
    plan = Plan(device, instances, seconds, trace.name if trace else arrivals, trace)
    runs = [
        Run(name, load, policy, scale, seed)
        for name in names
        for load in loads
        for policy in policies
        for scale in (*SCALES, None)
        for seed in range(seeds)
    ]
    try:
        results = measure(plan, runs, processes)
    except (TableError, TraceError) as error:
        fail(error)
    tables(results, plan, SCALES)
    if target:
        plot(results, plan, SCALES, PROMISED_LOAD if PROMISED_LOAD in loads else loads[-1], target)
    judge(broken_promises(results), check=check)


if __name__ == "__main__":
    main()
