"""`genserve tune` and the servers that it starts: a search that has time for the first measurement only."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import GENSERVE, ROOT, wait_until

from genserve.serve import own_server as own_server_module
from genserve.serve.options import ServeError
from genserve.serve.own_server import own_server
from genserve.serve.ports import free_ports

BUDGET_S = 60.0
PORT_OPTION = "--http-port"


def servers_on(port: int) -> list[list[str]]:
    """Return the command lines of processes with this HTTP port."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if any(words[index : index + 2] == [PORT_OPTION, str(port)] for index in range(len(words))):
            found.append(words)
    return found


def test_settings_in_force_are_measured_and_written(tmp_path: Path) -> None:
    """The load is tiny, and the budget too short for a change: five pairs, and a fresh run."""
    arguments = ["--model", "rerank", "--documents", "2", "--length", "5", "--in-flight", "2"]
    started = time.monotonic()
    ended = subprocess.run(
        [GENSERVE, "tune", "--budget", f"{BUDGET_S:g}s", *arguments, "-o", str(tmp_path), "--json"],
        env={**os.environ, "RERANK_MODEL_PATH": str(ROOT / "demo" / "rerank"), "MAX_NUM_SEQS": "128"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * BUDGET_S,
    )
    assert ended.returncode == 0, ended.stderr
    assert time.monotonic() - started < BUDGET_S
    (found,) = json.loads(ended.stdout)["models"]
    assert found["before"] == {"MAX_NUM_SEQS": "128"}
    assert found["best"] in (found["before"], {})  # those in force, or the defaults: with this load they are alike
    assert found["base"]["per_second"] > 0
    written = (tmp_path / "genserve-tuned.env").read_text().splitlines()
    assert ("MAX_NUM_SEQS=128" in written) == bool(found["best"])


def processes_below(folder: Path) -> list[psutil.Process]:
    """Return the processes whose state is in a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("GENSERVE_STATE_DIR", "").startswith(str(folder)):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_sigterm_stops_the_servers(tmp_path: Path) -> None:
    tune = subprocess.Popen(
        [GENSERVE, "tune", "--model", "rerank", "-o", str(tmp_path / "found")],
        env={**os.environ, "RERANK_MODEL_PATH": str(ROOT / "demo" / "rerank"), "TMPDIR": str(tmp_path)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: len(processes_below(tmp_path)) > 1, what="a server to start")
    tune.terminate()
    _, errors = tune.communicate(timeout=60)
    assert (tune.returncode, errors.splitlines()[-1]) == (130, "genserve: interrupted: nothing was measured yet")
    wait_until(lambda: not processes_below(tmp_path), what="all processes to end")
    assert list((tmp_path / "found").iterdir()) == []


@pytest.mark.parametrize("stop_s", [0.0, 60.0], ids=["killed", "stopped"])
def test_server_that_is_not_ready_in_time_leaves_nothing(
    stop_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = free_ports(3)
    monkeypatch.setattr(own_server_module, "free_ports", lambda _: ports)
    with (
        pytest.raises(ServeError, match="the server was not ready within"),
        own_server(("rerank",), log=tmp_path / "log", timeout_s=2.5, stop_timeout_s=stop_s),
    ):
        pytest.fail("it cannot be ready")
    wait_until(lambda: not servers_on(ports[0]), what="all processes to end")
