"""Python scripts in processes of their own, so that nothing they leave behind affects the next measurement."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from genserve.serve.options import ServeError

TIMEOUT_S = 900


def run_script(script: Path, *arguments: str, python: Path | None = None) -> str:
    """Run a script, and return the last line of its output.

    Args:
        script: Python file.
        arguments: Command line.
        python: Interpreter, by default this process's own.

    Raises:
        ServeError: The script failed; the message ends with the last line of its errors.
        subprocess.TimeoutExpired: It took more than `TIMEOUT_S`.
    """
    ended = subprocess.run(
        [str(python or sys.executable), str(script), *arguments],
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
