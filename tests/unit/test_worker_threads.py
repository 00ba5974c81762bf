"""Threads that end their process if they fail, and log it."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from genserve_backend.worker.threads import EXIT_CODE, Busy

PROGRAM = """
import time
from genserve_backend import logs
from genserve_backend.worker.threads import start_thread

class Panic(BaseException):
    pass

def fail():
    {statement}

logs.configure()
start_thread(fail, name="read").join({patience})
print("alive", flush=True)
"""


def run(statement: str, patience: float = 30.0) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(statement=statement, patience=patience)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    "statement",
    ["raise ValueError('why')", "raise Panic('why')", "raise SystemExit('why')", "raise KeyboardInterrupt('why')"],
    ids=["exception", "panic", "exit", "interrupt"],
)
def test_failing_thread_ends_its_process(statement: str) -> None:
    ended = run(statement)
    assert ended.returncode == EXIT_CODE
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert "level=critical" in line
    assert "thread=read" in line
    assert "why" in line


def test_returning_thread_leaves_the_process_running() -> None:
    ended = run("return")
    assert (ended.returncode, ended.stdout) == (0, "alive\n")


def test_busy_measures_its_block() -> None:
    busy = Busy()
    assert busy.seconds == 0.0
    with busy:
        time.sleep(0.02)
        assert busy.seconds >= 0.02
    assert busy.seconds == 0.0
    with pytest.raises(ValueError, match="x"), busy:
        raise ValueError("x")
    assert busy.seconds == 0.0
