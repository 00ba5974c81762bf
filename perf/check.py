"""Comparison of two folders of results: values that got worse beyond noise.

    python perf/check.py BEFORE AFTER

`common.columns` says which columns are better when higher or lower.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from common.columns import Rule, rule
from common.command import SETTINGS, fail, new_table, show
from common.figures import t_quantile
from common.record import FOLDER, Record, number, read

Place = tuple[int, str, int, str]
"""Number of the table, first cell of the row, number of earlier rows with the same, and heading."""


@dataclass(frozen=True)
class Change:
    """A value in both folders."""

    run: str
    row: str
    column: str
    rule: Rule
    before: tuple[float, ...]
    """Of each run."""
    after: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Difference of the means; above 0 if it got worse."""
        return self.rule.better * (statistics.fmean(self.before) - statistics.fmean(self.after))

    @property
    def limit(self) -> float:
        """Largest loss that is not worth naming: the runs' noise, and no less than the rule's tolerance."""
        worth = max(self.rule.floor, self.rule.tolerance * abs(statistics.fmean(self.before)))
        return max(worth, noise(self.before, self.after))

    @property
    def is_worse(self) -> bool:
        """True if the loss is beyond the limit."""
        return self.loss > self.limit


def noise(before: Sequence[float], after: Sequence[float]) -> float:
    """Return half the width of the 95 % interval of a difference of means; 0 if nothing is repeated."""
    freedom = len(before) + len(after) - 2
    if freedom < 1:
        return 0.0
    squares = sum((value - statistics.fmean(values)) ** 2 for values in (before, after) for value in values)
    return t_quantile(freedom) * math.sqrt(squares / freedom * (1 / len(before) + 1 / len(after)))


def compare(before: Sequence[Record], after: Sequence[Record], *, absolute: bool) -> Iterator[Change]:
    """Yield every value that both have and a rule covers; those of this machine only if `absolute`."""
    ours, theirs = _by_key(before), _by_key(after)
    for key in [key for key in ours if key in theirs]:
        script, name = ours[key][0].script, ours[key][0].name
        earlier, later = _values(ours[key]), _values(theirs[key])
        for place in [place for place in earlier if place in later]:
            found = rule(script, place[-1])
            if found and found.better and (found.relative or absolute):
                yield Change(name, place[1], place[-1], found, tuple(earlier[place]), tuple(later[place]))


def newly_broken(before: Sequence[Record], after: Sequence[Record]) -> list[str]:
    """Return the scripts that kept all promises before, or ended without an error, and no longer do."""
    ours, theirs = _by_key(before), _by_key(after)
    lines = []
    for key in [key for key in ours if key in theirs]:
        for kind in ("error", "broken"):
            faults = [fault for record in theirs[key] if (fault := getattr(record, kind))]
            if faults and not any(getattr(record, kind) for record in ours[key]):
                text = faults[0] if kind == "error" else "; ".join(faults[0])
                lines.append(f"{theirs[key][0].name}: {text} ({len(faults)} of {len(theirs[key])} runs)")
    return lines


def gone(before: Sequence[Record], after: Sequence[Record]) -> list[str]:
    """Return what only the first folder has: runs, and rows of tables."""
    ours, theirs = _by_key(before), _by_key(after)
    lines = [f"{records[0].name}: not run" for key, records in ours.items() if key not in theirs]
    for key in [key for key in ours if key in theirs]:
        missing = dict.fromkeys(place[1] for place in _values(ours[key]) if place not in _values(theirs[key]))
        lines += [f"{ours[key][0].name}: no value of {row!r}" for row in missing]
    return lines


def _by_key(records: Sequence[Record]) -> dict[tuple[str, ...], list[Record]]:
    found: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for record in records:
        found[record.key].append(record)
    return dict(found)


def _values(records: Sequence[Record]) -> dict[Place, list[float]]:
    """Return the numbers of all runs by their place, without the first columns, which name the rows."""
    found: dict[Place, list[float]] = defaultdict(list)
    for record in records:
        for index, table in enumerate(record.tables):
            seen: Counter[str] = Counter()
            for first, *cells in table.rows:
                for heading, cell in zip(table.columns[1:], cells, strict=True):
                    value = number(cell)
                    if value is not None:
                        found[index, first, seen[first], heading].append(value)
                seen[first] += 1
    return found


def _mean(values: Sequence[float]) -> str:
    text = f"{statistics.fmean(values):.4g}"
    return text if len(values) == 1 else f"{text} ({min(values):.4g} to {max(values):.4g})"


@click.command(context_settings=SETTINGS)
@click.argument("before", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("after", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--absolute", is_flag=True, help="Compare times and rates too; only for runs on one idle machine.")
def main(before: Path, after: Path, absolute: bool) -> None:
    """Name what got worse from one folder of results to another; exit with 1 if anything did."""
    try:
        earlier, later = read(before), read(after)
    except ValueError as error:
        fail(error)
    machines = {record.machine for record in (*earlier, *later)}
    if absolute and len(machines) > 1:
        click.echo(f"absolute times of different machines: {'; '.join(map(str, machines))}", err=True)
    changes = list(compare(earlier, later, absolute=absolute))
    worse = [change for change in changes if change.is_worse]
    broken = newly_broken(earlier, later)
    for line in gone(earlier, later):
        click.echo(line, err=True)
    if worse:
        drawn = new_table("Run", "Row", "Column", "Better", "Before", "After", "Noise up to")
        for each in worse:
            better = "higher" if each.rule.better > 0 else "lower"
            means = _mean(each.before), _mean(each.after)
            drawn.add_row(each.run, each.row, each.column, better, *means, f"{each.limit:.3g}")
        show(drawn, "Worse")
    for line in broken:
        click.echo(line)
    click.echo(f"{len(worse)} of {len(changes)} values are worse; {len(broken)} runs fail that did not")
    if not changes and not broken:
        fail(f"nothing to compare: write results with {FOLDER}, and run the same commands")
    sys.exit(bool(worse or broken))


if __name__ == "__main__":
    main()
