"""`genserve tune` with a planted bad setting: found, within the budget, and the result as fast as the defaults.

The setting is planted in the environment of `genserve tune`. Afterwards, servers that know nothing of the search are
measured in turn: one with the environment file, one with the defaults. With --check it fails if the planted setting
stays, the budget is exceeded, or the file is slower than the defaults.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import COUNT, SETTINGS, fail, judge, new_table, show
from genserve.serve.options import ServeError
from genserve.tune.bench import Bench
from genserve.tune.files import ENVIRONMENT_FILE
from genserve.tune.gain import FEWEST_PAIRS, Gain, gain_of
from genserve.tune.interrupts import Interrupts
from genserve.tune.load import UNITS, Load, TrialFailed, image_load, rerank_load
from genserve.tune.search import show_gain
from genserve.tune.space import tuned

LOADS = {
    "flux": image_load(in_flight=8, sizes=[(64, 64)], steps=4),
    "rerank": rerank_load(in_flight=4, documents=16, length=60),
}
"""Loads that are lighter than `genserve tune`'s own, so that a few minutes are enough."""
OPTIONS = {
    "flux": ("--in-flight", "8", "--size", "64x64", "--steps", "4"),
    "rerank": ("--in-flight", "4", "--documents", "16", "--length", "60"),
}
"""The same loads, as options."""
SAME = 0.05
"""Loss in the mean up to which settings count as equally fast, if the interval reaches 0: they may be the same ones."""
BLOCK_S = 3.0
START_S = 120.0


def run_tune(model: str, planted: Mapping[str, str], budget_s: int, folder: Path) -> tuple[dict[str, Any], float]:
    """Run `genserve tune` with the planted setting; return what it prints, and its seconds."""
    command = [sys.executable, "-m", "genserve", "tune", "--model", model, "--budget", f"{budget_s}s"]
    command += [*OPTIONS[model], "--output", str(folder), "--json"]
    started = time.monotonic()
    ended = subprocess.run(command, env={**os.environ, **planted}, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.monotonic() - started
    if ended.returncode:
        raise ServeError(f"genserve tune ended with {ended.returncode}")
    return json.loads(ended.stdout)["models"][0], seconds


def written_settings(path: Path) -> dict[str, str]:
    """Return the variables that an environment file sets."""
    pairs = (word.split("=", 1) for word in shlex.split(path.read_text(encoding="utf-8"), comments=True))
    return {name: value for name, value in pairs if value}


def compare(load: Load, found: Mapping[str, str], pairs: int, log: Path) -> tuple[Gain, float, float]:
    """Measure servers with the found settings and with the defaults in turn; return the gain and both rates."""
    names = tuned(load.model, lossy=False)
    values = {name: found[name] for name in names if name in found}
    rates: list[tuple[float, float]] = []
    with Interrupts() as interrupts:
        # A variable that no server reads makes different servers of equal settings.
        sides: tuple[dict[str, str], ...] = ({"SIDE": "defaults"}, {"SIDE": "found", **values})
        bench = Bench(load, environment={}, variables=names, options=(), log=log, interrupts=interrupts)
        try:
            bench.calibrate(sides[0], block_s=BLOCK_S, deadline=time.monotonic() + START_S)
            for number in range(1, pairs + 1):
                order = sides if number % 2 else sides[::-1]
                rate = {
                    side["SIDE"]: bench.block(side, number, start_s=START_S, block_s=START_S).rate for side in order
                }
                rates.append((rate["defaults"], rate["found"]))
        finally:
            bench.close()
    defaults, found_rates = zip(*rates, strict=True)
    return gain_of(rates), sum(defaults) / pairs, sum(found_rates) / pairs


@click.command(context_settings=SETTINGS)
@click.option("--planted", default="FLUX_MAX_RUNNING=1", show_default=True, help="The bad setting, as NAME=VALUE.")
@click.option("--budget", type=COUNT, default=300, show_default=True, help="Seconds for `genserve tune`.")
@click.option("--pairs", type=click.IntRange(FEWEST_PAIRS, 16), default=8, show_default=True)
@click.option("--check", is_flag=True, help="Fail if a promise does not hold.")
def main(planted: str, budget: int, pairs: int, check: bool) -> None:
    """Run `genserve tune` with a planted bad setting, and measure what it has written."""
    name, _, value = planted.partition("=")
    models = [model for model in LOADS if name in tuned(model, lossy=False)]
    if not models:
        raise click.BadParameter(f"{name} is not tuned", param_hint="--planted")
    load = LOADS[models[0]]
    try:
        with tempfile.TemporaryDirectory(prefix="genserve-study-") as temporary:
            folder = Path(temporary)
            result, seconds = run_tune(load.model, {name: value}, budget, folder)
            found = written_settings(folder / ENVIRONMENT_FILE)
            gain, defaults, tuned_rate = compare(load, found, pairs, folder / "server.log")
    except (ServeError, TrialFailed) as error:
        fail(error)
    unit = UNITS[load.model]
    drawn = new_table("Change", f"{unit}/s", "p95, s", "Gain", "Verdict")
    base = result["base"]
    drawn.add_row(f"in force: {planted}", f"{base['per_second']:.1f}", f"{base['p95_s']:.3f}", "", "")
    for trial in result["trials"]:
        rate = "" if trial["per_second"] is None else f"{trial['per_second']:.1f}"
        p95 = "" if trial["p95_s"] is None else f"{trial['p95_s']:.3f}"
        shown = show_gain(Gain(**trial["gain"])) if trial["gain"] else ""
        drawn.add_row(trial["title"], rate, p95, shown, " ".join([trial["verdict"], trial["reason"]]).strip())
    show(drawn, f"genserve tune took {seconds:.0f} s of {budget}")
    for line in result["summary"]:
        click.echo(line)
    click.echo(f"fresh run: {defaults:.1f} {unit}/s with the defaults, {tuned_rate:.1f} as written: {show_gain(gain)}")
    broken = [f"the budget of {budget} s was exceeded: {seconds:.0f} s"] if seconds > budget else []
    if found.get(name) == value or not result["confirmed"]:
        broken.append(f"{planted} was not found, or its removal was not confirmed")
    if gain.high is None or gain.high < 0 or gain.mean < -SAME:
        broken.append(f"the settings as written are slower than the defaults: {show_gain(gain)}")
    judge(broken, check=check)


if __name__ == "__main__":
    main()
