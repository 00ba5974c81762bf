"""Device helpers: dtype, memory, thread count, streams, times and non-blocking copies."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from genserve_backend.board import Memory
from genserve_backend.settings import FluxDType, RerankDType, weights_dtype

What = TypeVar("What")


def resolve_dtype(dtype: FluxDType | RerankDType, device: str) -> torch.dtype:
    """Return the dtype to load weights in, see `settings.weights_dtype`."""
    resolved: torch.dtype = getattr(torch, weights_dtype(dtype, device))
    return resolved


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to `device` without waiting for the device.

    A copy from memory that is not pinned would wait for the whole stream.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def copy_together(lists: Sequence[Sequence[int]], device: torch.device) -> list[torch.Tensor]:
    """Copy lists of integers to `device` in one non-blocking transfer; return them as int64 tensors."""
    together = move(torch.tensor(list(chain.from_iterable(lists)), dtype=torch.int64), device)
    return list(torch.split(together, [len(each) for each in lists]))


ALIGNED = 4
"""int32 values after which each array of `copy_arrays` starts: 16 bytes, which compiled kernels count on."""


def copy_arrays(arrays: Sequence[NDArray[np.int32]], device: torch.device) -> list[torch.Tensor]:
    """Copy one-dimensional arrays to `device` in one non-blocking transfer; return them as int32 tensors."""
    starts = [0]
    for each in arrays:
        starts.append(starts[-1] + -(-len(each) // ALIGNED) * ALIGNED)
    together = np.zeros(starts[-1], dtype=np.int32)
    for start, each in zip(starts, arrays, strict=False):
        together[start : start + len(each)] = each
    moved = move(torch.from_numpy(together), device)
    return [moved[start : start + len(each)] for start, each in zip(starts, arrays, strict=False)]


def copy_back(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Copy a tensor to the host without waiting; return the copy, and the event after which it may be read.

    There is no event on a CPU: the tensor itself is returned.
    """
    if tensor.device.type != "cuda":
        return tensor.cpu(), None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host, record_event(tensor.device)


def own_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which GPU work goes to its own stream, alongside the streams of other threads."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def record_event(device: torch.device) -> torch.cuda.Event | None:
    """Return an event at the end of the current stream; None on a CPU.

    A thread that waits for the event sleeps instead of spinning.
    """
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


@dataclass
class Lap(Generic[What]):
    """A piece of work that a `Stopwatch` measures."""

    what: What
    seconds: float = 0.0
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
    """On a GPU, its start and its end in the stream."""
    is_discarded: bool = False

    def discard(self) -> None:
        """Leave the work out of the results."""
        self.is_discarded = True


class Stopwatch(Generic[What]):
    """Times of pieces of work on a device, read without waiting for it.

    A GPU runs behind the host, so that the host's clock shows when work was launched, not how long it took.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._laps: deque[Lap[What]] = deque()

    @contextmanager
    def measure(self, what: What) -> Iterator[Lap[What]]:
        """Measure the work of a with block in the current stream. Work that raises is left out."""
        lap = Lap(what, events=(_timing_event(), _timing_event()) if self._is_gpu else None)
        started = time.perf_counter()
        if lap.events:
            lap.events[0].record()
        yield lap
        if lap.events:
            lap.events[1].record()
        lap.seconds = time.perf_counter() - started
        self._laps.append(lap)

    def read(self) -> Iterator[tuple[What, float]]:
        """Yield what has ended since the last call, with its seconds."""
        while self._laps:
            lap = self._laps[0]
            if lap.events:
                start, end = lap.events
                if not end.query():  # type: ignore[no-untyped-call]
                    return
                lap.seconds = start.elapsed_time(end) / 1000
            self._laps.popleft()
            if not lap.is_discarded:
                yield lap.what, lap.seconds


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def wait_for_stream(device: torch.device) -> None:
    """Sleep until the current stream is done. Reading a result from the device would spin instead."""
    if event := record_event(device):
        event.synchronize()


def hand_over(tensor: torch.Tensor, event: torch.cuda.Event | None) -> None:
    """Let the current stream use a tensor of another stream after `event`.

    The allocator works per stream, and has to keep the memory until the current stream is done with it.
    """
    if event is not None:
        stream = torch.cuda.current_stream()
        stream.wait_event(event)
        tensor.record_stream(stream)


def use_reproducible_kernels(device_type: str) -> None:
    """Let equal inputs of equal shapes have equal results on this process's GPU. Call it before the first product.

    A CPU has nothing to set. cuBLAS needs workspaces of a fixed size for it, because work of several streams runs at a
    time: https://docs.nvidia.com/cuda/cublas/#results-reproducibility. An operator without reproducible kernels is a
    warning in the log, not an error.
    """
    if device_type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # no result depends on it


def limit_threads(share: int = 4) -> None:
    """Limit the calling thread, and threads that it starts, to 1 / `share` of torch's CPU threads.

    For helper threads alongside the one that runs the transformer. GNU OpenMP gives every thread a team of its own. As
    soon as all teams together are larger than the machine, all of them sleep instead of spinning: the demo's forwards
    then take 1.6 times as long on two cores, even while the other team is idle. torch's thread count is per thread of
    the process, so the main thread is not affected.
    """
    torch.set_num_threads(max(1, torch.get_num_threads() // share))


def memory(device: torch.device) -> Memory:
    """Return the device memory that this process holds, and the free and total memory of the device.

    On a CPU, these are the resident set, and the available and total memory of the machine.
    """
    if device.type == "cuda":
        return Memory(int(torch.cuda.memory_reserved(device)), *map(int, torch.cuda.mem_get_info(device)))
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    machine = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    free, total = (_bytes(machine.get(name)) for name in ("MemAvailable", "MemTotal"))
    return Memory(pages * os.sysconf("SC_PAGE_SIZE"), free, total)


def _bytes(size: str | None) -> int | None:
    """Return the bytes of a size in /proc/meminfo, such as ``1024 kB``."""
    return int(size.split()[0]) * 1024 if size else None
