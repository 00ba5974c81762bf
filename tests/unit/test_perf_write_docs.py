"""Tables of docs/benchmarks.md from records."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from perf_records import run_command, show_all

from common.record import Record, read
from common.runs import find
from write_docs import PAGE, blocks, main, rewrite

FAIRNESS = find("rerank-fairness")
SECTION = f"""Before.

    $ {FAIRNESS.command}

<!-- perf: rerank-fairness -->
| old |
| --- |
| 1 |
<!-- end -->
After.
"""


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def record(
    monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, *tables: tuple[list[str], list[list[str]]]
) -> None:
    """Show tables as the script of a run would."""
    run = find(name)
    for variable in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in run.environment.items():
        monkeypatch.setenv(variable, value)
    shown = [("", *table) for table in tables]
    run_command(monkeypatch, folder / name, lambda: show_all(*shown), run.script, *run.arguments)


def records(folder: Path) -> list[Record]:
    return [each for name in sorted(folder.iterdir()) for each in read(name)]


def test_present_numbers_are_written_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = PAGE.read_text()
    tables: dict[str, list[tuple[list[str], list[list[str]]]]] = {}
    for block in blocks(text):
        heading, _, *rows = text.splitlines()[block.first : block.last]
        tables.setdefault(block.run.name, []).append((cells(heading), [cells(row) for row in rows]))
        assert len(tables[block.run.name]) == block.number
    assert len(tables) > 12
    for name, shown in tables.items():
        record(monkeypatch, tmp_path, name, *shown)
    assert rewrite(text, records(tmp_path)) == (text, [])


def test_newest_record_that_ended_well_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record(monkeypatch, tmp_path, "rerank-fairness", (["", "Ratio"], [["a|b", "1.65"]]))
    record(monkeypatch, tmp_path, "flux", (["", "Ours is"], [["a", "3 x"]]))
    (new,) = [each for each in records(tmp_path) if each.key == FAIRNESS.key]
    older = new.model_copy(update={"date": new.date - timedelta(days=1), "tables": []})
    failed = new.model_copy(update={"date": new.date + timedelta(days=1), "tables": [], "error": "it ended"})
    expected = SECTION.replace("| old |\n| --- |\n| 1 |", "| | Ratio |\n| --- | --- |\n| a\\|b | 1.65 |")
    assert rewrite(SECTION, [new, failed, older]) == (expected, [])


def test_tables_without_a_record_stay_and_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(SECTION)
    record(monkeypatch, tmp_path, "flux", (["", "Ours is"], [["a", "3 x"]]))
    result = CliRunner().invoke(main, [str(tmp_path / "flux"), "--page", str(page)])
    assert result.exit_code == 0
    assert "no results of rerank-fairness" in result.output
    assert page.read_text() == SECTION


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("perf: rerank-fairness", "perf: rerank-unfairness", "no run 'rerank-unfairness'"),
        (" --check", "", "not .venv/bin/python perf/studies/rerank_fairness.py"),
        ("<!-- end -->\n", "", "no <!-- end -->"),
        ("perf: rerank-fairness", "perf rerank-fairness", "is not a marker"),
        ("<!-- end -->", "<!-- perf: rerank-fairness -->", "inside of another"),
    ],
)
def test_wrong_markers_are_errors(old: str, new: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        rewrite(SECTION.replace(old, new), [])


def test_marked_table_that_the_script_does_not_show_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record(monkeypatch, tmp_path, "rerank-fairness", (["", "Ratio"], [["a", "1.65"]]))
    with pytest.raises(ValueError, match="has 1 tables, and 2 is marked"):
        rewrite(SECTION.replace("rerank-fairness -->", "rerank-fairness 2 -->"), records(tmp_path))
