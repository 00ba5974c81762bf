"""A `genserve serve` on free ports for the length of one run."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypeAlias

import psutil

from genserve.serve.options import ServeError
from genserve.serve.ports import free_ports

Process: TypeAlias = "subprocess.Popen[bytes]"
RETRY_S = 0.2
Addresses: TypeAlias = Mapping[str, str]
"""HOST:PORT for "grpc", "http" and "metrics"; any of them may be missing."""


@contextmanager
def own_server(
    models: tuple[str, ...],
    *,
    log: Path,
    environment: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
    timeout_s: float | None = None,
    stop_timeout_s: float | None = None,
) -> Iterator[Addresses]:
    """Serve on free ports inside the block; the server stops at its end, also after an error.

    Args:
        models: Models to serve.
        log: File that the server's log is copied to: its own folder is temporary.
        environment: Variables in addition to this process's own.
        options: Further options of `genserve serve`.
        timeout_s: Seconds until the server has to be ready.
        stop_timeout_s: Seconds at the end of the block after which all processes of the server are killed.

    Raises:
        ServeError: The server did not become ready, or not in time.
    """
    http_port, grpc_port, metrics_port = free_ports(3)
    command = ["serve", "--detach", "--http-port", str(http_port), "--grpc-port", str(grpc_port)]
    command += ["--metrics-port", str(metrics_port), *(word for model in models for word in ("--model", model))]
    with tempfile.TemporaryDirectory(prefix="genserve-own-") as state:
        errors = Path(state) / "errors.txt"
        with errors.open("wb") as file:
            starter = _genserve([*command, *options], state, errors=file, environment=environment)
        try:
            if _wait(starter, timeout_s):
                raise ServeError(f"the server did not start: {_last_line(errors)}; its log is {log}")
            ports = {"grpc": grpc_port, "http": http_port, "metrics": metrics_port}
            yield {name: f"127.0.0.1:{port}" for name, port in ports.items()}
        finally:
            _stop(http_port, state, starter, stop_timeout_s)
            for written in Path(state).rglob("server.log"):
                shutil.copy(written, log)


def _wait(starter: Process, timeout_s: float | None) -> int:
    try:
        return starter.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise ServeError(f"the server was not ready within {timeout_s:.0f} s") from None


def _last_line(errors: Path) -> str:
    """Return the error line of `genserve`, without the path of a log that is about to be removed."""
    line = errors.read_text(errors="replace").strip().rpartition("\n")[2]
    return line.removeprefix("genserve: ").partition(" (log: ")[0]


def _genserve(
    arguments: list[str],
    state: str,
    *,
    errors: IO[bytes] | int = subprocess.DEVNULL,
    environment: Mapping[str, str] | None = None,
) -> Process:
    return subprocess.Popen(
        [sys.executable, "-m", "genserve", *arguments],
        # No score cache: a load that repeats its requests would measure the cache.
        env={"SCORE_CACHE_BYTES": "0", **os.environ, **(environment or {}), "GENSERVE_STATE_DIR": state},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        # Ctrl-C is for this process, which then stops the server in order.
        start_new_session=True,
    )


def _stop(http_port: int, state: str, starter: Process, timeout_s: float | None) -> None:
    """Stop the server, also one that is still starting: `stop` finds it once its state file exists."""
    deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
    while True:
        nothing_follows = starter.poll() is not None
        stopping = _genserve(["stop", "--http-port", str(http_port)], state)
        try:
            stopping.wait(None if timeout_s is None else max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _kill(stopping.pid, starter.pid, *_recorded(state))
            stopping.wait()
            starter.wait()
            break
        if nothing_follows:
            break
        time.sleep(RETRY_S)


def _recorded(state: str) -> list[int]:
    """Return the process id in the state file of a server, if it has one."""
    pids = []
    for file in Path(state).rglob("server.json"):
        with suppress(OSError, ValueError, KeyError):
            pids.append(int(json.loads(file.read_text())["pid"]))
    return pids


def _kill(*pids: int) -> None:
    """Kill processes with all their descendants."""
    family: set[psutil.Process] = set()
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            family |= {process, *process.children(recursive=True)}
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
