"""Free and total memory of the devices that models can run on."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

PROBE = (
    "import json, torch\n"
    "gpus = range(torch.cuda.device_count())\n"
    "print(json.dumps([[*torch.cuda.mem_get_info(gpu), torch.cuda.get_device_capability(gpu)] for gpu in gpus]))"
)
PROBE_TIMEOUT_S = 120.0
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Files with the memory limit of this container, in versions 2 and 1 of control groups."""


@dataclass(frozen=True)
class Device:
    """A device that models can run on.

    Attributes:
        name: Name in torch's notation: ``cuda:N`` or ``cpu``.
        free: Free bytes.
        total: All bytes.
        capability: A GPU's compute capability; None for a CPU.
    """

    name: str
    free: int
    total: int
    capability: tuple[int, int] | None = None


def find_gpus() -> list[Device]:
    """Return the GPUs that torch can use, in its order; none without torch."""
    try:
        import torch
    except ModuleNotFoundError:
        return []
    if not torch.cuda.is_available():
        return []
    # In another process: the memory that CUDA itself takes in every process would be missing for the models.
    command = [sys.executable, "-c", PROBE]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PROBE_TIMEOUT_S)
        found = [(free, total, (major, minor)) for free, total, (major, minor) in json.loads(asked.stdout)]
    except (OSError, subprocess.SubprocessError, ValueError, TypeError):
        return []
    return [Device(f"cuda:{gpu}", *values) for gpu, values in enumerate(found)]


def find_cpu() -> Device:
    """Return the CPU with the memory of this machine, or of this container if that is less."""
    machine = psutil.virtual_memory()
    limit = int(machine.total)
    for path in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # version 2 writes "max" for no limit
            limit = min(limit, int(path.read_text(encoding="ascii")))
    return Device("cpu", min(int(machine.available), limit), limit)
