"""The parts of a call, one after another, each in a process of its own with a limit of its own.

A part that raises, hangs or dies costs nobody else anything: it leaves one line that says so.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genserve_backend.worker.link import worker_environment
from gpu import record
from gpu.plan import Part

ROOT = Path(__file__).parents[2]
SOURCES = (ROOT / "perf", ROOT / "backend", ROOT / "demo")
LEAST_S = 8.0
"""A part is not started with less time than this."""
DUMP_S = 1.0
"""Seconds that a part out of time gets to say where it is."""
TAIL_CHARACTERS = 4_000

DONE, FAILED, TIMED_OUT, KILLED, SKIPPED = "done", "failed", "timed out", "killed", "skipped"
STOPPED = "stopped"
"""Endings of a part; the last one is the caller's doing, and ends the call."""


@dataclass(frozen=True)
class Call:
    """The arguments that all parts of a call have in common."""

    stage: str
    device: str
    tiny: bool
    out: Path
    seconds: float
    """For everything."""


def run_parts(parts: Sequence[Part], call: Call, *, tell: Callable[[str], None]) -> bool:
    """Run the parts, and write a line at the start and one for the end of each; return whether all did well."""
    deadline = time.monotonic() + call.seconds
    names = [part.name for part in parts]
    shared = {"stage": call.stage, "device": call.device, "tiny": call.tiny}
    began = time.strftime("%Y-%m-%d %H:%M:%S %z")
    record.append(call.out, {"kind": record.STARTED, **shared, "parts": names, "began": began})
    well = True
    with tempfile.TemporaryDirectory(prefix="genserve-gpu-", dir=_fastest()) as scratch:
        for number, part in enumerate(parts, 1):
            left = deadline - time.monotonic()
            started = time.monotonic()
            ended: dict[str, Any] = {"status": STOPPED}
            try:
                limit_s = min(part.limit_s, left)
                ended = _run(part, call, Path(scratch), limit_s=limit_s) if left >= LEAST_S else _late(left)
            finally:
                seconds = time.monotonic() - started
                line = {"kind": record.ENDED, "stage": call.stage, "part": part.name, "seconds": seconds, **ended}
                record.append(call.out, line)
            well = well and ended["status"] == DONE
            tell(f"{call.stage} {number}/{len(parts)} {part.name}: {ended['status']}, {seconds:.1f} s")
    return well


def _late(left: float) -> dict[str, Any]:
    return {"status": SKIPPED, "reason": f"{max(0.0, left):.0f} s were left of the call"}


def _run(part: Part, call: Call, scratch: Path, *, limit_s: float) -> dict[str, Any]:
    """Run one part; return how it ended."""
    told = {
        "stage": call.stage,
        "name": part.name,
        "target": part.target,
        "device": call.device,
        "tiny": call.tiny,
        "out": str(call.out.resolve()),
        "scratch": str(scratch),
        "values": dict(part.values),
    }
    with tempfile.TemporaryFile() as errors:
        command = [sys.executable, "-m", "gpu.part", json.dumps(told)]
        with _started(command, errors, environment(tiny=call.tiny)) as process:
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGUSR1)
                time.sleep(DUMP_S)
                code = None
        ended = _ending(code, limit_s)
        return ended if ended["status"] == DONE else {**ended, "stderr": _tail(errors)}


def _ending(code: int | None, limit_s: float) -> dict[str, Any]:
    if code is None:
        return {"status": TIMED_OUT, "reason": f"its limit was {limit_s:.0f} s"}
    if code < 0:
        return {"status": KILLED, "reason": signal.Signals(-code).name}
    return {"status": FAILED, "reason": f"exit status {code}"} if code else {"status": DONE}


@contextmanager
def _started(command: list[str], errors: Any, environ: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process with a session of its own; end it with all of its children."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, env=environ, start_new_session=True
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the compiler's processes too, where the part itself has ended
        process.wait()


def environment(*, tiny: bool) -> dict[str, str]:
    """Return a part's environment: a worker's, with this tree's packages before those that the caller named."""
    named = os.environ.get("PYTHONPATH")
    paths = [*map(str, SOURCES), *([named] if named else [])]
    # A dry run does not wait for a compiler, nor for threads that others keep from running.
    usual = {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"} if tiny else {}
    return {**usual, **worker_environment(), "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def _tail(errors: Any) -> str:
    errors.seek(0)
    text: str = errors.read().decode(errors="replace").strip()
    return text[-TAIL_CHARACTERS:]


def _fastest() -> str | None:
    """Return the memory's file system where a large model fits into it, else None."""
    memory = Path("/dev/shm")  # noqa: S108
    needed = 24 * 2**30
    try:
        stat = os.statvfs(memory)
    except OSError:
        return None
    return str(memory) if stat.f_bavail * stat.f_frsize > needed else None
