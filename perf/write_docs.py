"""Tables of docs/benchmarks.md, from the records of a folder.

A table stands between `<!-- perf: NAME -->` and `<!-- end -->`; NAME is a run of perf/common/runs.py, followed by the
number of its table if it shows several. The command above it has to be the run's. The sentences around stay.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from common.command import SETTINGS, fail
from common.machine import ROOT
from common.plain import markdown
from common.record import Record, read
from common.runs import Run, find

PAGE = ROOT / "docs" / "benchmarks.md"
START = re.compile(r"<!-- perf: (?P<name>[\w-]+)(?: (?P<number>[1-9]))? -->")
END = "<!-- end -->"
COMMAND = re.compile(r"    \$ (?P<command>.*?)(?:\s{2,}#.*)?")


@dataclass(frozen=True)
class Block:
    """A marked table: its run and the lines between the markers."""

    run: Run
    number: int
    """From 1."""
    first: int
    last: int
    """Lines of the text; `last` is the end's marker."""


def blocks(text: str) -> list[Block]:
    """Return the marked tables of a page, in their order.

    Raises:
        ValueError: A marker has no run or no end, or is below another command than its run's.
    """
    found: list[Block] = []
    command, start = "", None
    for line_number, line in enumerate(text.splitlines()):
        if shown := COMMAND.fullmatch(line):
            command = shown["command"]
        elif line.startswith("## "):
            command = ""
        elif line.startswith("<!-- perf"):
            marker = START.fullmatch(line)
            if marker is None or start is not None:
                raise ValueError(f"line {line_number + 1}: {line} is not a marker, or inside of another one")
            run = find(marker["name"])
            if command != run.command:
                raise ValueError(f"line {line_number + 1}: {run.name} is {run.command}, not {command or 'nothing'}")
            start = run, int(marker["number"] or 1), line_number + 1
        elif line == END and start is not None:
            found.append(Block(*start, line_number))
            start = None
    if start is not None:
        raise ValueError(f"line {start[2]}: the table has no {END}")
    return found


def rewrite(text: str, records: Sequence[Record]) -> tuple[str, list[str]]:
    """Return a page with the tables of each run's newest record that ended well, and the runs without one.

    Raises:
        ValueError: A marker is wrong, or a record lacks a table.
    """
    newest: Mapping[tuple[str, ...], Record] = {
        record.key: record for record in sorted(records, key=lambda record: record.date) if not record.error
    }
    lines, missing = text.splitlines(), []
    for block in reversed(blocks(text)):
        record = newest.get(block.run.key)
        if record is None:
            missing.append(block.run.name)
        elif len(record.tables) < block.number:
            raise ValueError(f"{block.run.name} has {len(record.tables)} tables, and {block.number} is marked")
        else:
            table = record.tables[block.number - 1]
            lines[block.first : block.last] = markdown(table.columns, table.rows).splitlines()
    return "\n".join(lines) + "\n", list(dict.fromkeys(reversed(missing)))


@click.command(context_settings=SETTINGS)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--page", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=PAGE)
def main(folder: Path, page: Path) -> None:
    """Write the tables of docs/benchmarks.md from the records of FOLDER."""
    try:
        text, missing = rewrite(page.read_text(encoding="utf-8"), read(folder))
    except ValueError as error:
        fail(error)
    page.write_text(text, encoding="utf-8")
    if missing:
        click.echo(f"no results of {', '.join(missing)}: their tables are as before", err=True)


if __name__ == "__main__":
    main()
