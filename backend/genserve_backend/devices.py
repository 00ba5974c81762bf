"""What there is to know of a device: its arithmetic, its memory, its threads."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from genserve_backend.settings import RerankDType


def resolve_dtype(dtype: RerankDType, device: str) -> torch.dtype:
    """The torch dtype to load weights in: auto is bfloat16 on a GPU and float32 on a CPU, int8 starts from float32."""
    if dtype == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    if dtype == "int8":
        return torch.float32
    named: torch.dtype = getattr(torch, dtype)
    return named


def step_aside(share: int = 4) -> None:
    """Let the calling thread, and those that start after it, use a `share`-th of the CPU threads that torch has.

    For threads beside the one that runs the transformer. GNU OpenMP gives each thread that works in parallel a team of
    its own, and as soon as all teams together are larger than the machine, all of them wait by sleeping instead of
    spinning: the demo's forwards then take 1.6 times as long on two cores, even while the other team has nothing to do.
    torch counts threads for each thread of a process, so the main one is not affected.
    """
    torch.set_num_threads(max(1, torch.get_num_threads() // share))


def memory_bytes(device: torch.device) -> int:
    """What this process holds of the device's memory; on a CPU its resident set."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
