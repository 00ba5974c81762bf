"""The files of `genserve tune`, its report, and the configuration that it starts from."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest

from genserve.serve.options import ServeError
from genserve.tune.files import FILES, check_folder, environment_text, script_text, write_files
from genserve.tune.gain import gain_of
from genserve.tune.load import Sample, rerank_load
from genserve.tune.report import as_json, print_table, summary, tuned_variables
from genserve.tune.run import Goal, Result
from genserve.tune.search import Change, Check, Outcome, Trial
from genserve.tune.start import from_environment, from_server
from genserve.types import InstanceLoad, Setting

NOW = datetime(2030, 1, 2, 3, 4, tzinfo=timezone.utc)
GOAL = Goal("throughput", 95, 0.02, lossy=False)
GAIN = gain_of([(20.0, 25.0)] * 6)
VALUES = {"MAX_NUM_SEQS": "32", "WORKERS": "2"}
SAMPLE = Sample(10.0, 200, (0.1, 0.2))
FOUND = Result(
    rerank_load(in_flight=4, documents=32, length=100),
    Outcome(
        before={"RERANK_THREADS": "1", "MAX_NUM_SEQS": "32"},
        best=VALUES,
        found=VALUES,
        base=SAMPLE,
        trials=[
            Trial(Change({"RERANK_THREADS": None}), "adopted", GAIN, SAMPLE),
            Trial(Change({"RERANK_COMPILE": "true"}), "failed", reason="[red]the worker died"),
            Trial(Change({"RERANK_DTYPE": "int8"}, "no VNNI"), "not tried", reason="no VNNI"),
        ],
        checks=[Check(VALUES, "before", GAIN, holds=True, found=SAMPLE, other=SAMPLE)],
    ),
    ("cpu",),
)


def sourced(folder: Path) -> dict[str, str]:
    """Return what the start script passes to `genserve`: its arguments, and the variables that are not this test's."""
    program = folder / "bin" / "genserve"
    program.parent.mkdir(exist_ok=True)
    program.write_text('#!/bin/sh\nfor word in "$@"; do printf "ARGUMENT_%s\\0" "$word"; done\nenv -0\n')
    program.chmod(0o755)
    ended = subprocess.run(
        ["/bin/sh", str(folder / "genserve-tuned.sh"), "--http-port", "9000"],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
        env={"PATH": f"{program.parent}:{os.environ['PATH']}", "RERANK_THREADS": "1"},
    )
    words = ended.stdout.split("\0")
    values = dict(word.split("=", 1) for word in words if "=" in word and not word.startswith("ARGUMENT_"))
    return {**values, "arguments": " ".join(each.removeprefix("ARGUMENT_") for each in words if "ARGUMENT_" in each)}


def test_script_starts_the_server_with_the_settings(tmp_path: Path) -> None:
    folder = tmp_path / "a folder with 'quotes' and $(dollars)"
    folder.mkdir()
    path = '/models/it\'s $HOME "here"'
    text = environment_text(
        tuned_variables(FOUND, GOAL), {"RERANK_MODEL_PATH": path}, summary(FOUND, GOAL), devices=["cpu"], now=NOW
    )
    write_files(folder, text, script_text(["--model", "rerank", "--repository", "/my models"]))
    values = sourced(folder)
    assert values["WORKERS"] == "2"
    assert values["MAX_NUM_SEQS"] == "32"
    assert values["RERANK_THREADS"] == ""  # the setting before is taken back
    assert values["RERANK_MODEL_PATH"] == path
    assert values["arguments"] == "serve --model rerank --repository /my models --http-port 9000"
    assert [each for each in folder.iterdir() if each.suffix == ".part"] == []


def test_environment_file_has_its_origin_and_plain_lines() -> None:
    text = environment_text({"WORKERS": "2"}, {}, ["rerank: a\nremark"], devices=["cuda:0"], now=NOW)
    lines = text.splitlines()
    assert lines[0] == "# Written by genserve tune on 2030-01-02 03:04 UTC"
    assert "cuda:0" in lines[1]
    assert "genserve 0." in lines[2]
    assert "# rerank: a remark" in lines
    assert [line for line in lines if line and not line.startswith("#")] == ["WORKERS=2"]


def test_files_are_replaced_only_on_request(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    check_folder(folder, force=False)
    write_files(folder, "", "")
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    with pytest.raises(ServeError, match=r"genserve-tuned\.env exists; --force replaces it"):
        check_folder(folder, force=False)
    check_folder(folder, force=True)


def test_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ServeError, match="cannot create"):
        check_folder(tmp_path / "file" / "folder", force=False)


# The report.


def test_table_has_every_trial_with_its_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(FOUND, GOAL)
    shown = capsys.readouterr().out
    for text in ("RERANK_THREADS", "adopted", "+25.0 % (25.0 to 25.0)", "20.00 documents/s", "0.195", "confirmed"):
        assert text in shown
    assert "failed: [red]the worker died" in " ".join(shown.replace("│", " ").split())
    assert "not tried: no VNNI" in " ".join(shown.replace("│", " ").split())
    assert "rerank: MAX_NUM_SEQS=32 WORKERS=2 against those before: +25.0 % (25.0 to 25.0) in 6 pairs" in shown


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({}, "rerank: MAX_NUM_SEQS=32 WORKERS=2 are written"),
        (
            {"best": {}},
            "rerank: MAX_NUM_SEQS=32 WORKERS=2 was not confirmed by a fresh run; the defaults are written",
        ),
        (
            {"best": {"RERANK_THREADS": "1"}},
            "rerank: MAX_NUM_SEQS=32 WORKERS=2 was not confirmed by a fresh run; RERANK_THREADS=1 stay",
        ),
        ({"checks": []}, "rerank: MAX_NUM_SEQS=32 WORKERS=2 are written, not confirmed by a fresh run"),
        (
            {"best": {}, "found": {}, "before": {}, "checks": []},
            "rerank: no change gained beyond noise, of 1 that were measured; the defaults stay",
        ),
        ({"best": {}, "found": {}, "before": {}, "trials": []}, "rerank: no change was measured; the defaults stay"),
    ],
    ids=["confirmed", "refuted", "kept", "interrupted", "nothing", "no-time"],
)
def test_summary_says_what_the_files_have(changed: dict[str, object], line: str) -> None:
    result = replace(FOUND, outcome=replace(FOUND.outcome, **changed))  # type: ignore[arg-type]
    assert summary(result, GOAL)[-1] == line


def test_json_has_all_numbers() -> None:
    found = json.loads(json.dumps(as_json(FOUND, GOAL)))
    assert found["best"] == {"MAX_NUM_SEQS": "32", "WORKERS": "2"}
    assert found["confirmed"] is True
    assert found["base"]["per_second"] == 20.0
    assert [trial["verdict"] for trial in found["trials"]] == ["adopted", "failed", "not tried"]
    assert found["trials"][0]["gain"]["low"] == pytest.approx(0.25)
    assert found["checks"][0]["against"] == "before"


# The configuration in force.


def test_environment_in_force_has_the_settings_of_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    environ = {"RERANK_MODEL_PATH": "models/mine", "WORKERS": "2", "MAX_NUM_SEQS": "", "FLUX_DTYPE": "fp8", "HOME": "/"}
    start = from_environment(["rerank"], tmp_path, environ)
    assert start.environment == {"RERANK_MODEL_PATH": str(tmp_path / "models" / "mine"), "WORKERS": "2"}


def running(tmp_path: Path, **sources: tuple[object, str]) -> list[Setting]:
    settings = {"model_path": (str(tmp_path), "config.pbtxt"), **sources}
    return [Setting("rerank", name, value, source) for name, (value, source) in settings.items()]


def instance(device: str, index: int) -> InstanceLoad:
    return InstanceLoad(f"rerank_0_{index}", "rerank", device, None, 0, 0, 1, 1, 1, ready=True)


def test_running_server_gives_its_settings(tmp_path: Path) -> None:
    settings = running(
        tmp_path,
        max_num_seqs=(64, "environment MAX_NUM_SEQS"),
        compiled=(False, "environment RERANK_COMPILE"),
        dtype=("auto", "default"),
    )
    instances = [instance("cuda:0", 0), instance("cuda:0", 1), instance("cuda:1", 2), instance("cuda:1", 3)]
    start = from_server(["rerank"], tmp_path, settings, instances)
    assert start.environment == {
        "MAX_NUM_SEQS": "64",
        "RERANK_COMPILE": "false",
        "RERANK_MODEL_PATH": str(tmp_path),
        "WORKERS": "2",
    }


def test_running_server_has_to_have_the_model_here(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="no instance of rerank"):
        from_server(["rerank"], tmp_path, running(tmp_path), [])
    with pytest.raises(ServeError, match="tune a server on its own machine"):
        from_server(["rerank"], tmp_path, running(tmp_path / "missing"), [instance("cpu", 0)])
