"""The command line of `genserve tune`, with a simulated search."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fake_servers import FakeServer

from genserve.cli import main
from genserve.protocol import Call, Outputs
from genserve.serve.process import MODEL_PATH_ENVS
from genserve.tune import run as run_module
from genserve.tune.gain import gain_of
from genserve.tune.interrupts import Interrupts
from genserve.tune.load import Load, Sample
from genserve.tune.run import Result
from genserve.tune.search import Change, Check, Outcome, Trial, TuneError
from genserve.types import InstanceLoad, Setting

GAIN = gain_of([(20.0, 25.0)] * 6)
SAMPLE = Sample(10.0, 200, (0.1, 0.2))


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Load, dict[str, Any]]]:
    """Replace the search by one that finds two instances, and return the arguments of its calls."""
    calls = []

    def tune_model(load: Load, start: Any, goal: Any, **options: Any) -> Result:
        calls.append((load, {"start": start, "goal": goal, **options}))
        name = {"flux": "FLUX_WORKERS", "rerank": "WORKERS"}[load.model]
        outcome = Outcome({}, {name: "2"}, {name: "2"}, SAMPLE)
        outcome.trials = [Trial(Change({name: "2"}), "adopted", GAIN, SAMPLE)]
        outcome.checks = [Check({name: "2"}, "before", GAIN, holds=True, found=SAMPLE, other=SAMPLE)]
        return Result(load, outcome, ("cpu",))

    monkeypatch.setattr(run_module, "tune_model", tune_model)
    return calls


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", *MODEL_PATH_ENVS):
        monkeypatch.delenv(name, raising=False)
    return lambda *arguments: CliRunner().invoke(main, ["tune", *arguments], prog_name="genserve")


def test_both_models_share_the_budget_and_the_files(tuned: Any, invoke: Any, tmp_path: Path) -> None:
    result = invoke("--budget", "10m", "-o", "found")
    assert result.exit_code == 0, result.output
    (images, first), (rankings, second) = tuned
    assert (images.model, images.in_flight, rankings.model, rankings.in_flight) == ("flux", 8, "rerank", 4)
    assert second["deadline"] - first["deadline"] == pytest.approx((600 - 15) / 2, abs=5)
    lines = (tmp_path / "found" / "genserve-tuned.env").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == ["FLUX_WORKERS=2", "WORKERS=2"]
    assert 'exec genserve serve "$@"' in (tmp_path / "found" / "genserve-tuned.sh").read_text()
    assert "adopted" in result.stdout


def test_options_reach_the_search(tuned: Any, invoke: Any, tmp_path: Path) -> None:
    arguments = ["--model", "flux", "--size", "64x128", "--steps", "3", "--in-flight", "5", "--gpus", "0,1", "--lossy"]
    result = invoke(*arguments, "--for", "latency", "--percentile", "99", "--margin", "5", "--json")
    assert result.exit_code == 0, result.output
    ((load, options),) = tuned
    assert load.request(0)["height"] == 128
    assert (load.request(0)["steps"], load.in_flight) == (3, 5)
    goal = options["goal"]
    assert (goal.objective, goal.percent, goal.margin, goal.lossy) == ("latency", 99, 0.05, True)
    assert options["options"] == ["--gpus", "0,1"]
    assert "serve --model flux --gpus 0,1" in (tmp_path / "genserve-tuned.sh").read_text()
    found = json.loads(result.stdout)
    assert found["models"][0]["best"] == {"FLUX_WORKERS": "2"}
    assert found["files"] == ["genserve-tuned.env", "genserve-tuned.sh"]


def test_tasks_of_a_file_select_the_models(tuned: Any, invoke: Any, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"query": "q", "documents": ["d"]}\n')
    assert invoke("--tasks", str(tasks)).exit_code == 0
    assert [load.model for load, _ in tuned] == ["rerank"]
    result = invoke("--tasks", str(tasks), "--model", "flux", "--force")
    assert (result.exit_code, result.stderr) == (1, f"genserve: {tasks} has no task for flux\n")


class RunningServer(FakeServer):
    """A server with a reranker of two instances and one setting."""

    async def infer(self, call: Call, timeout_s: float) -> Outputs:
        records: dict[bytes, list[Any]] = {
            b"load": [
                InstanceLoad(f"rerank_0_{index}", "rerank", "cpu", None, 0, 0, 1, 1, 1, ready=True)
                for index in range(2)
            ],
            b"config": [
                Setting("rerank", "model_path", self.url, "config.pbtxt"),
                Setting("rerank", "max_num_seqs", 64, "environment MAX_NUM_SEQS"),
            ],
        }
        items = [asdict(each) for each in records[call.inputs["ACTION"].item()]]
        for item in items:
            del item["url"]
        return {"TASK": np.array([json.dumps(items).encode()], object), "PREVIEW": np.array([b""], object)}


def test_running_server_gives_its_models_and_settings(
    tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAX_NUM_SEQS", "8")
    server = RunningServer(str(tmp_path))
    result = CliRunner().invoke(main, ["tune", "--url", "a:1"], prog_name="genserve", obj=server)
    assert result.exit_code == 0, result.output
    ((load, options),) = tuned
    assert load.model == "rerank"
    assert options["start"].environment == {
        "MAX_NUM_SEQS": "64",
        "RERANK_MODEL_PATH": str(tmp_path),
        "WORKERS": "2",
    }


def test_existing_files_are_kept(tuned: Any, invoke: Any, tmp_path: Path) -> None:
    (tmp_path / "genserve-tuned.env").write_text("mine")
    result = invoke("--model", "flux")
    assert (result.exit_code, result.stderr) == (1, "genserve: genserve-tuned.env exists; --force replaces it\n")
    assert tuned == []
    assert invoke("--model", "flux", "--force").exit_code == 0
    assert "FLUX_WORKERS=2" in (tmp_path / "genserve-tuned.env").read_text()


def test_settings_that_cannot_be_measured_are_one_line(
    invoke: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tune_model(*_: Any, **__: Any) -> Result:
        raise TuneError("flux: the settings in force cannot be measured: no checkpoint")

    monkeypatch.setattr(run_module, "tune_model", tune_model)
    result = invoke("--model", "flux")
    assert result.exit_code == 1
    assert result.stderr == "genserve: flux: the settings in force cannot be measured: no checkpoint\n"
    assert list(tmp_path.iterdir()) == []


def test_model_that_cannot_be_measured_does_not_take_the_other_ones_result(
    tuned: Any, invoke: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_module.tune_model

    def tune_model(load: Load, *arguments: Any, **options: Any) -> Result:
        if load.model == "rerank":
            raise TuneError("rerank: no checkpoint")
        return found(load, *arguments, **options)

    monkeypatch.setattr(run_module, "tune_model", tune_model)
    result = invoke()
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, "genserve: rerank: no checkpoint")
    assert "FLUX_WORKERS=2" in (tmp_path / "genserve-tuned.env").read_text()


def test_interruption_writes_what_was_found(
    tuned: Any, invoke: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_module.tune_model

    def tune_model(load: Load, *arguments: Any, **options: Any) -> Result:
        if load.model == "rerank":
            os.kill(os.getpid(), signal.SIGTERM)
        return found(load, *arguments, **options)

    monkeypatch.setattr(run_module, "tune_model", tune_model)
    result = invoke()
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (130, "genserve: interrupted")
    assert "FLUX_WORKERS=2" in (tmp_path / "genserve-tuned.env").read_text()
    assert "--model flux" in (tmp_path / "genserve-tuned.sh").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "soon"], "allowed: a time as 90s, 20m or 1.5h"),
        (["--budget", "59"], "allowed: a time as 90s, 20m or 1.5h, at least 60 s"),
        (["--size", "64"], "allowed: WIDTHxHEIGHT as in 1024x768"),
        (["--rate", "2"], "it goes with --for latency"),
        (["--url", "a:1", "--url", "b:1"], "one server"),
        (["--model", "tasks"], "is not one of"),
    ],
    ids=" ".join,
)
def test_wrong_options_are_rejected(arguments: list[str], message: str, invoke: Any) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("20m", 1200), ("1.5h", 5400)])
def test_budget_has_units(text: str, seconds: float, tuned: Any, invoke: Any) -> None:
    assert invoke("--budget", text, "--model", "flux", "--model", "rerank").exit_code == 0
    (_, first), (_, second) = tuned
    assert second["deadline"] - first["deadline"] == pytest.approx((seconds - 15) / 2, abs=5)


# Signals.


def test_signal_waits_until_servers_have_stopped() -> None:
    steps = []

    def stop_servers() -> None:
        with interrupts.held():
            os.kill(os.getpid(), signal.SIGTERM)
            steps.append("stopped")
        steps.append("not reached")

    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        stop_servers()
    assert steps == ["stopped"]


def test_only_the_first_signal_interrupts() -> None:
    with Interrupts():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)  # the handlers before are back


def test_client_needs_no_torch_for_help() -> None:
    code = "import sys, genserve.cli; sys.exit('torch' in sys.modules or 'rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
