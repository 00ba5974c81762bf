"""The machine, the packages and the commit that a result belongs to. Only Python's own modules."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMAND_TIMEOUT_S = 20.0


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the version of Python and of each package, which may be missing."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def cpu_model() -> str:
    """Return the processor's name, as the kernel has it where it does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def cores() -> int:
    """Return the number of CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gib() -> float:
    """Return the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def gpus(field: str) -> list[str]:
    """Return one of nvidia-smi's fields for every GPU, as in `name`; nothing without nvidia-smi or a GPU."""
    return _lines("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader") or []


def commit() -> tuple[str | None, bool]:
    """Return the checkout's commit, None if it is not a checkout, and whether files differ from it."""
    head = _lines("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not head:
        return None, False
    return head[0], bool(_lines("git", "-C", str(ROOT), "status", "--porcelain"))


def _lines(*command: str) -> list[str] | None:
    """Return a command's output, None if it fails."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMMAND_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return [line.strip() for line in ended.stdout.splitlines() if line.strip()]
