"""`make perf-full`: all load tests, comparisons and studies, one after the other, with results as JSON.

A failure does not stop the others. perf/common/runs.py has the list.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import click

from common.command import COUNT, SETTINGS, new_table, show
from common.machine import ROOT
from common.record import FOLDER, read
from common.runs import RUNS, Run

RESULTS = Path(__file__).resolve().parent / "results"
LIMIT = 4.0
"""Times the expected minutes after which a run is ended, and no less than `LEAST_LIMIT_S`."""
LEAST_LIMIT_S = 1800.0
STOP_S = 60.0
"""Between an interrupt, by which a script stops its servers, and its kill."""
DONE, LEFT_OUT, FAILED = "done", "left out", "failed"


@dataclass(frozen=True)
class End:
    """The end of a run, or the reason why it was not started."""

    run: Run
    status: str
    seconds: float = 0.0
    reason: str = ""


def run_all(
    runs: Sequence[Run], folder: Path, *, minutes: Mapping[str, float], budget: float | None, repeats: int
) -> list[End]:
    """Run everything that fits in the budget, in turn, and return how it ended.

    Args:
        runs: In their order.
        folder: For records and logs.
        minutes: Expected minutes by name.
        budget: Minutes for all; None without a limit.
        repeats: Rounds of all runs: a change of the machine's load meets all of them.
    """
    started = time.monotonic()
    ends: list[End] = []
    for repeat in range(1, repeats + 1):
        for run in runs:
            left = None if budget is None else budget - (time.monotonic() - started) / 60
            if missing := run.missing():
                end = End(run, LEFT_OUT, reason=f"needs {', '.join(missing)}")
            elif left is not None and minutes[run.name] > left:
                end = End(run, LEFT_OUT, reason=f"expected {minutes[run.name]:.0f} min, {max(left, 0):.0f} left")
            else:
                click.echo(f"{run.name}: about {minutes[run.name]:.0f} min, round {repeat} of {repeats}", err=True)
                end = run_one(run, folder, limit_s=max(LEAST_LIMIT_S, LIMIT * 60 * minutes[run.name]))
            click.echo(f"{run.name}: {end.status} after {end.seconds:.0f} s {end.reason}".rstrip(), err=True)
            ends.append(end)
    return ends


def run_one(run: Run, folder: Path, *, limit_s: float) -> End:
    """Run one script, with its output in a log, and return how it ended."""
    log = folder / f"{run.name}.log"
    started = time.monotonic()
    with log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "perf" / run.script), *run.arguments],
            cwd=ROOT,
            env={**os.environ, **run.environment, FOLDER: str(folder.resolve())},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait(limit_s)
            reason = "" if code == 0 else _last_line(log) or f"exit code {code}"
        except subprocess.TimeoutExpired:
            reason = f"not finished within {limit_s:.0f} s"
        finally:
            _stop(process)
    return End(run, FAILED if reason else DONE, time.monotonic() - started, reason)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, and wait for it."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_line(log: Path) -> str:
    return next((line.strip() for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "")


def expected(runs: Sequence[Run], folders: Sequence[Path]) -> dict[str, float]:
    """Return the expected minutes by name: those of the newest record in the folders, else those of the list."""
    found: dict[tuple[str, ...], float] = {}
    for folder in folders:
        try:
            found |= {record.key: record.seconds / 60 for record in read(folder) if not record.error}
        except ValueError:
            continue
    return {run.name: found.get(run.key, run.minutes) for run in runs}


def _runs(_: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, ...]:
    names = tuple(word.strip() for word in (text or "").split(",") if word.strip())
    if unknown := [name for name in names if name not in {run.name for run in RUNS}]:
        raise click.BadParameter(f"no run {', '.join(unknown)}; --list has them", param=parameter)
    return names


@click.command(context_settings=SETTINGS)
@click.option("--only", callback=_runs, metavar="NAMES", help="Only these, separated by commas.")
@click.option("--skip", callback=_runs, metavar="NAMES", help="All but these, separated by commas.")
@click.option("--budget", type=click.FloatRange(min=0), metavar="MINUTES", help="Leave out what does not fit.")
@click.option(
    "--repeats", type=COUNT, default=1, show_default=True, help="Rounds of all: perf/check.py needs their noise."
)
@click.option(
    "--results", type=click.Path(file_okay=False, path_type=Path), help="Folder.  [default: perf/results/full-DATE]"
)
@click.option("--list", "is_list", is_flag=True, help="Print the runs and start none.")
def main(
    only: tuple[str, ...],
    skip: tuple[str, ...],
    budget: float | None,
    repeats: int,
    results: Path | None,
    is_list: bool,
) -> None:
    """Run all load tests, comparisons and studies, one after the other, with a record of each in a folder."""
    runs = [run for run in RUNS if (not only or run.name in only) and run.name not in skip]
    minutes = expected(runs, sorted(RESULTS.glob("full-*")))
    if is_list:
        for run in runs:
            click.echo(f"{run.name:<22}{minutes[run.name]:>4.0f} min  {run.command}")
        return
    folder = results or RESULTS / f"full-{datetime.now(timezone.utc):%Y%m%dT%H%M%S}"
    folder.mkdir(parents=True, exist_ok=True)
    # In the background of a shell, interrupts are ignored, by the scripts too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    ends = run_all(runs, folder, minutes=minutes, budget=budget, repeats=repeats)
    drawn = new_table("Run", "End", "Seconds", "Reason")
    for end in ends:
        drawn.add_row(end.run.name, end.status, f"{end.seconds:.0f}", end.reason)
    show(drawn, f"Results: {folder}")
    sys.exit(any(end.status == FAILED for end in ends))


if __name__ == "__main__":
    main()
