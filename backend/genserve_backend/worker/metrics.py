"""Metric descriptors: what an engine counts, independent of the server that exports it.

A heartbeat carries values by descriptor. The adapter registers every descriptor with Triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from genserve_backend.board import Memory


@dataclass(frozen=True)
class Gauge:
    """A metric that holds the current value."""

    name: str
    help: str


@dataclass(frozen=True)
class Counter:
    """A metric that only grows."""

    name: str
    help: str
    labels: tuple[tuple[str, str], ...] = ()
    """Label names and values, in addition to ``model`` and ``instance``."""


@dataclass(frozen=True)
class Histogram:
    """A metric that counts observations by size."""

    name: str
    help: str
    buckets: tuple[float, ...]


Metric = Gauge | Counter | Histogram

RUNNING = Gauge("genserve_running", "Requests that the engine works on now")
WAITING = Gauge("genserve_waiting", "Requests in the engine without a slot, including preempted ones")
DEVICE_MEMORY = Gauge(
    "genserve_device_memory_bytes", "Memory that the worker holds: GPU memory, or host memory without a GPU"
)
DEVICE_MEMORY_FREE = Gauge(
    "genserve_device_memory_free_bytes", "Free memory of the worker's device, or available host memory without a GPU"
)
DEVICE_MEMORY_TOTAL = Gauge(
    "genserve_device_memory_total_bytes", "All memory of the worker's device, or of the host without a GPU"
)
MEMORY_GAUGES = (DEVICE_MEMORY, DEVICE_MEMORY_FREE, DEVICE_MEMORY_TOTAL)
"""Gauges of the fields of `board.Memory`, in their order."""
ENGINE_METRICS = (RUNNING, WAITING, *MEMORY_GAUGES)
"""Metrics of every engine."""


def memory_gauges(memory: Memory) -> dict[Gauge, float]:
    """Return the gauges of the sizes that are known."""
    return {gauge: size for gauge, size in zip(MEMORY_GAUGES, memory, strict=True) if size is not None}


def memory_of(gauges: Mapping[Gauge, float]) -> Memory:
    """Return the sizes in a heartbeat's gauges."""
    sizes = (gauges.get(gauge) for gauge in MEMORY_GAUGES)
    return Memory(*(None if size is None else int(size) for size in sizes))


def stage_seconds(stage: str) -> Counter:
    """Return the counter of the seconds that an engine spends in `stage`."""
    return Counter("genserve_stage_seconds_total", "Seconds of work, by stage", (("stage", stage),))
