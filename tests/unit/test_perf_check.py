"""Comparison of two folders of results."""

from __future__ import annotations

import ast
from datetime import datetime, timedelta, timezone
from itertools import count
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from check import main
from common.columns import rule
from common.record import PERF, Machine, Record, Shown

DATES = (datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(minutes=minute) for minute in count())
HEADINGS = ["", "Images/s", "Ours is", "4 steps, s", "Mean batch"]


def write(
    folder: Path, *ratios: float, speed: float = 10.0, batch: float = 6.0, broken: list[str] | None = None
) -> None:
    """Write a record for each run's ratio to a global lock."""
    for ratio in ratios:
        rows = [
            ["GenServe", f"{speed}", "", f"{4 / speed:.2f}", f"{batch}"],
            ["a lock", "4", f"{ratio:.2f} x", "4", ""],
        ]
        record = Record(
            script="compare/flux.py",
            arguments=["--check"],
            options={},
            environment={},
            tables=[Shown(title="", columns=HEADINGS, rows=rows)],
            broken=broken or [],
            date=next(DATES),
            machine=Machine(cpu="a", cores=2, memory_gib=8),
            versions={},
            commit=None,
            dirty=False,
        )
        record.write(folder)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders."""
    return tmp_path / "before", tmp_path / "after"


def check(folders: tuple[Path, Path], *arguments: str) -> Result:
    return CliRunner().invoke(main, [*map(str, folders), *arguments])


def test_planted_regression_is_named(folders: tuple[Path, Path]) -> None:
    write(folders[0], 3.6, 3.7, 3.65)
    write(folders[1], 2.6, 2.7, 2.65)
    result = check(folders)
    assert result.exit_code == 1
    (line,) = [line for line in result.output.splitlines() if "a lock" in line]
    words = [word.strip() for word in line.split("│")[1:-1]]
    assert words[:6] == [
        "compare/flux.py --check",
        "a lock",
        "Ours is",
        "higher",
        "3.65 (3.6 to 3.7)",
        "2.65 (2.6 to 2.7)",
    ]


def test_same_difference_within_the_noise_of_repeats_is_not(folders: tuple[Path, Path]) -> None:
    write(folders[0], 2.7, 4.6, 3.65)
    write(folders[1], 1.7, 3.6, 2.65)
    assert check(folders).exit_code == 0


def test_improvement_is_no_regression(folders: tuple[Path, Path]) -> None:
    write(folders[0], 2.6)
    write(folders[1], 3.6)
    assert check(folders).exit_code == 0


def test_single_runs_have_a_tolerance(folders: tuple[Path, Path]) -> None:
    write(folders[0], 3.6)
    write(folders[1], 3.45)
    assert check(folders).exit_code == 0
    write(folders[1], 3.0)
    write(folders[0], 3.6)
    assert check(folders).exit_code == 0, "the two runs after differ too much"


def test_absolute_values_are_compared_only_on_demand(folders: tuple[Path, Path]) -> None:
    write(folders[0], 3.6, speed=10)
    write(folders[1], 3.6, speed=5, batch=2)
    assert check(folders).exit_code == 0
    result = check(folders, "--absolute")
    assert result.exit_code == 1
    assert "2 of 5 values are worse" in result.output
    assert "Mean batch" not in result.output


def test_newly_broken_promise_is_a_regression(folders: tuple[Path, Path]) -> None:
    write(folders[0], 3.6)
    write(folders[1], 3.6, broken=["below 2"])
    result = check(folders)
    assert result.exit_code == 1
    assert "compare/flux.py --check: below 2 (1 of 1 runs)" in result.output
    assert check((folders[1], folders[1])).exit_code == 0


def test_nothing_in_common_is_an_error(folders: tuple[Path, Path]) -> None:
    write(folders[0], 3.6)
    folders[1].mkdir()
    assert "has no records" in check(folders).output
    assert check(folders).exit_code == 1


@pytest.mark.parametrize(
    ("script", "heading", "better", "relative"),
    [
        ("compare/flux.py", "Ours is", 1, True),
        ("compare/flux.py", "Ours takes", -1, True),
        ("compare/flux.py", "Images/s", 1, False),
        ("compare/flux.py", "All, s", -1, False),
        ("studies/flux_compile.py", "Eager, s/image", -1, False),
        ("studies/gateway_aiperf.py", "1/s", 1, False),
        ("studies/goodput.py", "1.5 x", 1, True),
        ("studies/short_requests.py", "4 steps, p99, s", -1, True),
        ("studies/flux_precision.py", "place of a single thing", 1, True),
    ],
)
def test_rules(script: str, heading: str, better: int, relative: bool) -> None:
    found = rule(script, heading)
    assert found is not None
    assert (found.better, found.relative) == (better, relative)


def headings() -> list[tuple[str, str]]:
    """Return the literal headings of the scripts' tables, without those of first columns."""
    found = []
    for path in sorted(path for folder in ("compare", "studies") for path in (PERF / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in {"new_table", "Table"}
            ):
                names = [each.value for each in node.args[1:] if isinstance(each, ast.Constant) and each.value]
                found += [(path.relative_to(PERF).as_posix(), str(name)) for name in names]
    return found


def test_every_column_has_a_rule() -> None:
    assert len(headings()) > 80
    assert [pair for pair in headings() if rule(*pair) is None] == []
