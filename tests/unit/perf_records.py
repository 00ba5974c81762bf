"""Commands that show tables, and their records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from common.command import SETTINGS, new_table, show
from common.record import FOLDER, PERF

Cells = Sequence[Sequence[str]]


def run_command(
    monkeypatch: pytest.MonkeyPatch, folder: Path, body: Callable[[], None], script: str, *arguments: str
) -> Result:
    """Run a command as if it were a script in perf, with an option and a path, and its record in a folder."""

    @click.command(context_settings=SETTINGS)
    @click.option("--count", type=int, default=3)
    @click.option("--file", type=click.Path(path_type=Path), default=PERF / "a.json")
    @click.argument("others", nargs=-1, type=click.UNPROCESSED)
    def command(count: int, file: Path, others: tuple[str, ...]) -> None:
        body()

    monkeypatch.setattr("sys.argv", [str(PERF / script), *arguments])
    monkeypatch.setenv(FOLDER, str(folder))
    known = arguments if arguments[:1] == ("--count",) else ("--", *arguments)
    return CliRunner().invoke(command, known)


def show_all(*tables: tuple[str, Sequence[str], Cells]) -> None:
    """Show tables of titles, headings and rows."""
    for title, headings, rows in tables:
        drawn = new_table(*headings)
        for row in rows:
            drawn.add_row(*row)
        show(drawn, title)
