"""Time, memory and kernels of a device; the only module that differs between CUDA and the CPU of a dry run."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MEGABYTE = 2**20
WAIT = "called a synchronizing CUDA operation"
"""The warning of torch's sync debug mode."""
OURS = ("genserve_backend", "gpu")
"""Packages to whose lines a wait is attributed."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call."""

    first_ms: float
    """First call, with one-time setup."""
    host_ms: float
    """Median time until the call returned, starting with an idle device."""
    device_ms: float | None
    """Median time between an event before the call and one after it. None on a CPU."""
    row_ms: float
    """Mean time of calls back to back."""
    spread: float
    """Difference of slowest and fastest call, as a share of the median."""
    repeats: int

    @property
    def ms(self) -> float:
        """Return the device's time where there is one, else the host's."""
        return self.host_ms if self.device_ms is None else self.device_ms


@dataclass
class Watched:
    """The profiler's record of a period."""

    kernels: Counter[str] = field(default_factory=Counter)
    """Microseconds by name; on a CPU those of torch's operators."""
    counts: Counter[str] = field(default_factory=Counter)
    """Number of runs by name."""
    operators: list[str] = field(default_factory=list)
    """torch's operators, if requested."""
    busy_ms: float | None = None
    """Time with at least one kernel running. None on a CPU."""
    span_ms: float | None = None
    """From the first kernel's start to the last one's end. None on a CPU."""


class Clock:
    """The clock of one device.

    Args:
        device: As torch names it: "cpu", "cuda:0".
        brief: Measure a single call, for a dry run.
    """

    def __init__(self, device: str, *, brief: bool = False) -> None:
        self._brief = brief
        self.device = torch.device(device)
        self.on_gpu = self.device.type == "cuda"
        if self.on_gpu:
            torch.cuda.set_device(self.device)

    def wait(self) -> None:
        """Wait until the device is idle."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def run(
        self, call: Callable[[], Any], *, seconds: float = 1.5, least: int = 3, most: int = 20, warm_up: int = 2
    ) -> Timing:
        """Measure calls one by one, and then as many back to back.

        Args:
            call: Function to measure; it may return before the device is done.
            seconds: Approximate total time.
            least: Minimum number of calls of each kind.
            most: Maximum number of calls of each kind.
            warm_up: Excluded calls after the first one.
        """
        if self._brief:
            least = most = 1
            warm_up = 0
        first_ms = self._one(call)[1]
        for _ in range(warm_up):
            call()
        probe_ms = max(self._one(call)[1], 1e-3)
        repeats = int(min(most, max(least, seconds * 1000 / 2 / probe_ms)))
        host, wall, device = zip(*(self._one(call) for _ in range(repeats)), strict=True)
        self.wait()
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        self.wait()
        row_ms = (time.perf_counter() - started) * 1000 / repeats
        seen = [each for each in device if each is not None]
        spread = (max(seen or wall) - min(seen or wall)) / statistics.median(seen or wall)
        device_ms = statistics.median(seen) if seen else None
        return Timing(first_ms, statistics.median(host), device_ms, row_ms, spread, repeats)

    def _one(self, call: Callable[[], Any]) -> tuple[float, float, float | None]:
        """Return milliseconds until the call returned, until all was done, and between two events."""
        self.wait()
        before, after = self._event(), self._event()
        started = time.perf_counter()
        if before:
            before.record()
        call()
        returned = time.perf_counter()
        if after:
            after.record()
        self.wait()
        ended = time.perf_counter()
        device = float(before.elapsed_time(after)) if before and after else None
        return (returned - started) * 1000, (ended - started) * 1000, device

    def _event(self) -> torch.cuda.Event | None:
        return torch.cuda.Event(enable_timing=True) if self.on_gpu else None  # type: ignore[no-untyped-call]

    def seconds(self, call: Callable[[], Any], *, repeats: int = 3, enough_s: float = 8.0) -> tuple[float, float]:
        """Return the median seconds of a call after a first one, and the seconds of the first one.

        Args:
            call: Function to measure.
            repeats: Maximum number of calls after the first one.
            enough_s: Seconds of these calls after which no further one starts.
        """
        first_s = self._whole(call)
        seconds = [self._whole(call)]
        while not self._brief and len(seconds) < repeats and sum(seconds) < enough_s:
            seconds.append(self._whole(call))
        return statistics.median(seconds), first_s

    def _whole(self, call: Callable[[], Any]) -> float:
        """Return the seconds until all of a call's work is done."""
        self.wait()
        started = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - started

    def memory(self) -> dict[str, float | None]:
        """Return megabytes in use, their peak since `forget_peak`, and megabytes reserved; None on a CPU."""
        if not self.on_gpu:
            return dict.fromkeys(("used_mb", "peak_mb", "reserved_mb"))
        cuda = torch.cuda
        used, peak = cuda.memory_allocated(self.device), cuda.max_memory_allocated(self.device)
        reserved = cuda.memory_reserved(self.device)
        return {"used_mb": used / MEGABYTE, "peak_mb": peak / MEGABYTE, "reserved_mb": reserved / MEGABYTE}

    def forget_peak(self) -> None:
        """Reset the memory peak."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)

    @contextmanager
    def watch(self, *, operators: bool = False) -> Iterator[Watched]:
        """Record the kernels of all threads inside the block; `Watched` is filled at its end."""
        activity = torch.profiler.ProfilerActivity
        activities = [activity.CUDA] if self.on_gpu else [activity.CPU]
        if operators and self.on_gpu:
            activities.append(activity.CPU)
        watched = Watched()
        self.wait()
        with torch.profiler.profile(activities=activities) as profile:
            yield watched
            self.wait()
        _fill(watched, list(profile.events() or ()), on_gpu=self.on_gpu)

    def waits(self, call: Callable[[], Any]) -> Counter[tuple[str, str]] | None:
        """Count the lines in which the host waits: the innermost one of this project, and the innermost of all.

        Waits in any thread that torch's sync debug mode detects: copies from and to pageable memory, `item`, `nonzero`
        and so on, but not deliberate waits for an event or a stream. None on a CPU.
        """
        if not self.on_gpu:
            return None
        self.wait()
        with counted_waits() as seen:
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return seen


@contextmanager
def counted_waits() -> Iterator[Counter[tuple[str, str]]]:
    """Count the warnings of torch's sync debug mode in all threads, by line."""
    seen: Counter[tuple[str, str]] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if WAIT in str(message):
            seen[_places(sys._getframe(1))] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield seen


def _fill(watched: Watched, events: list[Any], *, on_gpu: bool) -> None:
    on_device = [event for event in events if event.device_type.name == "CUDA"]
    host = [event for event in events if event.device_type.name == "CPU"]
    watched.operators = [event.name for event in host]
    if not on_gpu:
        for event in host:
            watched.kernels[event.name] += event.self_cpu_time_total
            watched.counts[event.name] += 1
        return
    kernels = [event for event in on_device if not getattr(event, "is_user_annotation", False)]
    ranges = sorted((event.time_range.start, event.time_range.end) for event in kernels)
    for event in kernels:
        watched.kernels[event.name] += event.time_range.end - event.time_range.start
        watched.counts[event.name] += 1
    if ranges:
        watched.busy_ms = _union(ranges) / 1000
        watched.span_ms = (max(end for _, end in ranges) - ranges[0][0]) / 1000


def _union(ranges: list[tuple[float, float]]) -> float:
    """Return the total length that sorted ranges cover."""
    covered, reached = 0.0, ranges[0][0]
    for start, end in ranges:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def _places(frame: Any) -> tuple[str, str]:
    """Return the innermost line of this project in a stack, and the innermost line that is not of `warnings`."""
    stack = [each for each in traceback.extract_stack(frame) if Path(each.filename).stem != "warnings"]
    ours = [each for each in stack if set(OURS) & set(Path(each.filename).parts) and each.filename != __file__]
    return _place(ours), _place(stack)


def _place(stack: list[traceback.FrameSummary]) -> str:
    if not stack:
        return "-"
    last = stack[-1]
    name = "/".join(Path(last.filename).parts[-2:])
    return f"{name}:{last.lineno} {' '.join((last.line or '').split())}"


def rotating(values: list[Any]) -> Callable[[], Any]:
    """Return a function that cycles through values: repeated use of one buffer would measure the cache."""
    return itertools.cycle(values).__next__
