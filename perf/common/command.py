"""Frame of a script: checkpoints, options, runs in turn, tables, errors and the verdict."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
from rich.console import Console
from rich.table import Table

from common import machine, record

ROOT = machine.ROOT
FLUX_CHECKPOINT = ROOT / "demo" / "flux"
RERANK_CHECKPOINT = ROOT / "demo" / "rerank"
SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
"""Of every click command."""
COUNT = click.IntRange(min=1)
WIDTH = 120
"""Characters of a table, at least: a pipe or a narrow terminal would cut the headings."""

Result = TypeVar("Result")


def run_in_turn(runs: Mapping[str, Callable[[], Result]], repeats: int) -> dict[str, list[Result]]:
    """Call every function `repeats` times, in turn, and return the results by title.

    In turn, so that a change of the machine's load meets all of them.
    """
    results: dict[str, list[Result]] = {title: [] for title in runs}
    for repeat in range(repeats):
        for title, run in runs.items():
            click.echo(f"run {repeat + 1} of {repeats}: {title}", err=True)
            results[title].append(run())
    return results


def new_table(*headings: str) -> Table:
    """Return an empty table: text on the left in the first column, numbers on the right in the others."""
    first, *others = headings
    drawn = Table(first)
    for heading in others:
        drawn.add_column(heading, justify="right")
    return drawn


def show(drawn: Table, title: str = "") -> None:
    """Print a table below its title, and record it."""
    if recorded := record.current():
        rows = zip(*(column.cells for column in drawn.columns), strict=True)
        headings = [str(column.header) for column in drawn.columns]
        recorded.add_table(title or str(drawn.title or ""), headings, [[str(cell) for cell in row] for row in rows])
    console = Console()
    console.width = max(console.width, WIDTH)
    if title:
        console.print(title)
    console.print(drawn)


def judge(broken: Sequence[str], *, check: bool) -> None:
    """Print and record the promises that do not hold; exit with 1 when there are any and `check` is set."""
    if recorded := record.current():
        recorded.add_broken(broken)
    for line in broken:
        click.echo(line, err=True)
    if check and broken:
        sys.exit(1)


def fail(error: object) -> NoReturn:
    """Print and record an error in one line, and exit with 1."""
    line = " ".join(str(error).split())
    if recorded := record.current():
        recorded.error = line
    click.echo(f"{Path(sys.argv[0]).name}: {line}", err=True)
    sys.exit(1)
