"""Device helpers: dtype, memory, thread count, streams, and copies that wait for nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from genserve_backend.settings import RerankDType


def resolve_dtype(dtype: RerankDType, device: str) -> torch.dtype:
    """Return the dtype to load weights in: auto is bfloat16 on a GPU and float32 on a CPU; int8 starts from float32."""
    if dtype == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    if dtype == "int8":
        return torch.float32
    named: torch.dtype = getattr(torch, dtype)
    return named


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to `device` without waiting for what the device has to do already.

    A copy from memory that is not pinned waits for the whole stream.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def copy_together(rows: Sequence[Sequence[int]], device: torch.device) -> list[torch.Tensor]:
    """Copy lists of integers to `device` in one transfer that waits for nothing; return them as int64 tensors."""
    together = move(torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64), device)
    return list(torch.split(together, [len(row) for row in rows]))


def own_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context whose work on a GPU goes to a stream of its own, beside the other threads'."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def mark(device: torch.device) -> torch.cuda.Event | None:
    """Return an event behind all that the current stream has to do; None where nothing is queued, on a CPU.

    A thread that waits for it sleeps instead of keeping a core busy.
    """
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def finish(device: torch.device) -> None:
    """Sleep until the current stream has nothing left to do: what reads a result then need not keep a core busy."""
    if event := mark(device):
        event.synchronize()


def hand_over(tensor: torch.Tensor, event: torch.cuda.Event | None) -> None:
    """Let the current stream use a tensor of another one, once `event` is over.

    The allocator, which goes by streams, keeps the memory until this one has read it.
    """
    if event is not None:
        stream = torch.cuda.current_stream()
        stream.wait_event(event)
        tensor.record_stream(stream)


def step_aside(share: int = 4) -> None:
    """Let the calling thread, and those that start after it, use a `share`-th of the CPU threads that torch has.

    For threads beside the one that runs the transformer. GNU OpenMP gives each thread that works in parallel a team of
    its own, and as soon as all teams together are larger than the machine, all of them wait by sleeping instead of
    spinning: the demo's forwards then take 1.6 times as long on two cores, even while the other team has nothing to do.
    torch counts threads for each thread of a process, so the main one is not affected.
    """
    torch.set_num_threads(max(1, torch.get_num_threads() // share))


def memory_bytes(device: torch.device) -> int:
    """Return the bytes of the device's memory that this process holds; on a CPU its resident set."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
