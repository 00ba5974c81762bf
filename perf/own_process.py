"""A contender in a process of its own: what it leaves behind touches nobody."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from genserve.serve.options import ServeError

TIMEOUT_S = 900


def last_line(script: Path, *arguments: str) -> str:
    """What a Python script printed last.

    Raises:
        ServeError: It failed; the message ends with its last line of errors.
        subprocess.TimeoutExpired: It took more than `TIMEOUT_S`.
    """
    ended = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if ended.returncode:
        reason = ended.stderr.strip().rpartition("\n")[2]
        raise ServeError(f"{script.stem} {arguments[0]} failed: {reason}")
    return ended.stdout.strip().rpartition("\n")[2]
