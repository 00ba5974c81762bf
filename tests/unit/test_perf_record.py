"""Records of scripts' runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from perf_records import run_command, show_all

from common.command import fail, judge
from common.record import FOLDER, number, read

SCRIPT = "studies/made_up.py"
TABLE = ("Speeds", ("", "Ours is"), (("GenServe", ""), ("a lock", "3.63 x")))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("13.7", 13.7),
        ("3.63 x", 3.63),
        ("1,256", 1256.0),
        ("62.5%", 62.5),
        ("-0.2 %", -0.2),
        ("+5.2 %", 5.2),
        ("9e-08", 9e-8),
        ("95.2 ± 0.4 %", 95.2),
        ("52.0 s", 52.0),
        ("1.17 x (1.10 to 1.20)", 1.17),
        ("", None),
        ("-", None),
        ("25, 25, 25, 25", None),
        ("4, 8, 20, 28 steps", None),
        ("128 x 128", None),
        ("6 gateways, 6 servers", None),
        ("saturated", None),
        ("nan", None),
    ],
)
def test_number_of_a_cell(text: str, value: float | None) -> None:
    assert number(text) == value


def test_record_has_options_tables_and_promises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def body() -> None:
        show_all(TABLE, ("", ("Start", "Seconds"), (("eager", "1.2"),)))
        judge(["too slow"], check=False)

    assert run_command(monkeypatch, tmp_path, body, SCRIPT, "--count", "5").exit_code == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("studies-made_up-")
    (record,) = read(tmp_path)
    assert record.script == SCRIPT
    assert record.arguments == ["--count", "5"]
    assert record.options == {"count": 5, "file": "perf/a.json", "others": []}
    assert record.environment["OMP_NUM_THREADS"] == "1"
    assert [table.title for table in record.tables] == ["Speeds", ""]
    assert record.tables[0].columns == ["", "Ours is"]
    assert record.tables[0].rows == [["GenServe", ""], ["a lock", "3.63 x"]]
    assert json.loads(path.read_text())["tables"][0]["values"] == [[None, None], [None, 3.63]]
    assert record.broken == ["too slow"]
    assert record.error is None
    assert record.seconds > 0
    assert record.machine.cpu
    assert record.machine.cores > 0
    assert record.machine.memory_gib > 0
    assert {"python", "torch", "diffusers", "transformers", "tritonclient", "genserve"} == set(record.versions)
    assert record.name == f"OMP_NUM_THREADS=1 {SCRIPT} --count 5"


def test_kept_promises_are_an_empty_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run_command(monkeypatch, tmp_path, lambda: judge([], check=True), SCRIPT)
    assert [record.broken for record in read(tmp_path)] == [[]]


def test_broken_promise_is_recorded_before_the_exit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run_command(monkeypatch, tmp_path, lambda: judge(["slow"], check=True), SCRIPT).exit_code == 1
    assert [(record.broken, record.error) for record in read(tmp_path)] == [(["slow"], None)]


def test_errors_are_recorded_with_the_tables_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def failing() -> None:
        show_all(TABLE)
        fail("the server\nended")

    def raising() -> None:
        show_all(TABLE)
        raise RuntimeError("no")

    assert run_command(monkeypatch, tmp_path / "a", failing, SCRIPT).exit_code == 1
    assert run_command(monkeypatch, tmp_path / "b", raising, SCRIPT).exit_code == 1
    records = [*read(tmp_path / "a"), *read(tmp_path / "b")]
    assert [record.error for record in records] == ["the server ended", "RuntimeError: no"]
    assert [len(record.tables) for record in records] == [1, 1]


def test_nothing_is_written_without_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def body() -> None:
        monkeypatch.delenv(FOLDER)
        show_all(TABLE)

    assert run_command(monkeypatch, tmp_path, body, SCRIPT).exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_scripts_that_work_on_records_have_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run_command(monkeypatch, tmp_path, lambda: show_all(TABLE), "check.py").exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no records"):
        read(tmp_path)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a\.json is not a record"):
        read(tmp_path)
