"""The list of `make perf-full`, and its runs."""

from __future__ import annotations

from pathlib import Path

import pytest

import full
from common.record import FOLDER, PERF
from common.runs import EXCLUDED, RUNS, Run
from full import DONE, FAILED, LEFT_OUT, expected, run_all


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Checkout with scripts that succeed, fail and do not end."""
    folder = tmp_path / "perf" / "studies"
    folder.mkdir(parents=True)
    (folder / "good.py").write_text(
        "import os, pathlib, sys\n"
        f"pathlib.Path(os.environ['{FOLDER}'], 'said.txt').write_text(' '.join([*sys.argv[1:], os.environ['LEVEL']]))\n"
    )
    (folder / "bad.py").write_text("raise SystemExit('it is broken')\n")
    (folder / "endless.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(full, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


def test_every_script_is_in_the_list_or_excluded() -> None:
    files = {
        path.relative_to(PERF).as_posix()
        for folder in ("compare", "studies")
        for path in (PERF / folder).glob("*.py")
        if path.name != "__init__.py"
    }
    listed = {run.script for run in RUNS}
    assert files - listed - set(EXCLUDED) == set()
    assert set(EXCLUDED) - files == set()
    assert listed & set(EXCLUDED) == set()
    assert all(EXCLUDED.values())


def test_listed_scripts_exist_and_names_are_unique() -> None:
    assert [run.name for run in RUNS if not (PERF / run.script).is_file()] == []
    assert len({run.name for run in RUNS}) == len(RUNS)
    assert len({run.key for run in RUNS}) == len(RUNS)


def test_command_has_the_variables() -> None:
    run = Run("a", "studies/a.py --check", 1, environment={"OMP_NUM_THREADS": "1"})
    assert run.command == "OMP_NUM_THREADS=1 .venv/bin/python perf/studies/a.py --check"


def test_failure_does_not_stop_the_others(scripts: Path) -> None:
    runs = [Run("bad", "studies/bad.py", 1), Run("good", "studies/good.py --check", 1, environment={"LEVEL": "7"})]
    ends = run_all(runs, scripts, minutes={"bad": 1, "good": 1}, budget=None, repeats=1)
    assert [(end.run.name, end.status, end.reason) for end in ends] == [
        ("bad", FAILED, "it is broken"),
        ("good", DONE, ""),
    ]
    assert (scripts / "said.txt").read_text() == "--check 7"


def test_runs_beyond_the_budget_and_without_their_files_are_left_out(scripts: Path) -> None:
    runs = [
        Run("long", "studies/good.py", 60, environment={"LEVEL": "1"}),
        Run("other", "studies/good.py", 1, needs=("no/such/python",), environment={"LEVEL": "1"}),
        Run("short", "studies/good.py", 1, environment={"LEVEL": "1"}),
    ]
    ends = run_all(runs, scripts, minutes={run.name: run.minutes for run in runs}, budget=5, repeats=1)
    assert [end.status for end in ends] == [LEFT_OUT, LEFT_OUT, DONE]
    assert [end.reason for end in ends[:2]] == ["expected 60 min, 5 left", "needs no/such/python"]


def test_rounds_are_in_turn(scripts: Path) -> None:
    runs = [Run("one", "studies/bad.py", 1), Run("two", "studies/bad.py", 1)]
    ends = run_all(runs, scripts, minutes={"one": 1, "two": 1}, budget=None, repeats=2)
    assert [end.run.name for end in ends] == ["one", "two", "one", "two"]


def test_endless_run_is_ended(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full, "STOP_S", 2)
    end = full.run_one(Run("endless", "studies/endless.py", 1), scripts, limit_s=0.5)
    assert (end.status, end.reason) == (FAILED, "not finished within 0 s")


def test_expected_minutes_are_those_of_the_list_without_records(tmp_path: Path) -> None:
    assert expected(RUNS[:2], [tmp_path]) == {run.name: run.minutes for run in RUNS[:2]}
