"""Metric descriptors: what an engine counts, independent of the server that exports it.

A heartbeat carries values by descriptor. The adapter registers every descriptor with Triton.
"""

from __future__ import annotations

from dataclasses import dataclass


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
ENGINE_METRICS = (RUNNING, WAITING, DEVICE_MEMORY)
"""Metrics of every engine."""


def stage_seconds(stage: str) -> Counter:
    """Return the counter of the seconds that an engine spends in `stage`."""
    return Counter("genserve_stage_seconds_total", "Seconds of work, by stage", (("stage", stage),))
