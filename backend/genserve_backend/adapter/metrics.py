"""What operators see on Triton's own /metrics: how busy an instance is, and what became of its requests."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import triton_python_backend_utils as pb_utils

from genserve_backend.worker.messages import Beat

Described = Mapping[str, tuple[str, str]]
"""By the name in a beat: the metric's name and description."""


@dataclass(frozen=True)
class Families:
    """The metrics of one kind of engine."""

    gauges: Described
    counters: Described
    stages: Sequence[str]
    """Each beat counts ``{stage}_seconds``."""
    batch: tuple[str, str]
    """Name and description of the histogram over the sizes of forwards."""
    buckets: Sequence[float]


_GAUGES = {
    "running": ("genserve_running", "Requests that the engine works on now"),
    "waiting": ("genserve_waiting", "Requests in the engine without a place to run, paused ones among them"),
    "device_memory_bytes": (
        "genserve_device_memory_bytes",
        "Memory that the worker holds: of the GPU, or of the machine where it has none",
    ),
}
FLUX = Families(
    gauges=_GAUGES | {"decoding": ("genserve_decoding", "Images that are being decoded")},
    counters={
        "steps": ("genserve_steps_total", "Denoising steps, counted for each image"),
        "preemptions": ("genserve_preemptions_total", "Times an image was paused for a more urgent one"),
    },
    stages=("encode", "denoise", "decode"),
    batch=("genserve_batch_size", "Images in a forward"),
    buckets=(1, 2, 4, 8, 12, 16, 24, 32, 64),
)
RERANK = Families(
    gauges=_GAUGES,
    counters={
        "pairs": ("genserve_pairs_total", "Pairs of query and document that the model has read"),
        "tokens": ("genserve_tokens_total", "Tokens that the model has read, padding not counted"),
        "padding_tokens": ("genserve_padding_tokens_total", "Padding that the model has read besides"),
        "prefix_tokens_saved": (
            "genserve_prefix_tokens_saved_total",
            "Tokens that were not read again because other prompts begin with them too",
        ),
        "queue_seconds": (
            "genserve_queue_seconds_total",
            "Seconds that requests waited in the engine for their first forward",
        ),
        "cache_hits": ("genserve_score_cache_hits_total", "Pairs whose score was known from an earlier request"),
    },
    stages=("forward",),
    batch=("genserve_batch_tokens", "Tokens in a forward, padding not counted"),
    buckets=(64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
)
OUTCOMES = ("done", "failed", "cancelled")

logger = logging.getLogger(__name__)

_families: dict[str, Any] = {}
_families_lock = threading.Lock()


def _family(name: str, description: str, kind: str) -> Any:
    """A metric family is made once a process; its name may be known to Triton from other processes."""
    with _families_lock:
        if name not in _families:
            _families[name] = pb_utils.MetricFamily(
                name=name, description=description, kind=getattr(pb_utils.MetricFamily, kind)
            )
        return _families[name]


class Metrics:
    """The metrics of one instance; a `worker.supervisor.Monitor`. What goes wrong here costs no request anything.

    Args:
        families: Which metrics there are.
        model: Label of every metric.
        instance: The other one.
    """

    def __init__(self, families: Families, model: str, instance: str) -> None:
        self._labels = {"model": model, "instance": instance}
        self._gauges = {key: self._metric(*about, "GAUGE") for key, about in families.gauges.items()}
        self._counters = {key: self._metric(*about, "COUNTER") for key, about in families.counters.items()}
        for stage in families.stages:
            self._counters[f"{stage}_seconds"] = self._metric(
                "genserve_stage_seconds_total", "Seconds of work, by stage", "COUNTER", stage=stage
            )
        self._outcomes = {
            outcome: self._metric("genserve_requests_total", "Rows answered, by outcome", "COUNTER", outcome=outcome)
            for outcome in OUTCOMES
        }
        self._restarts = self._metric(
            "genserve_worker_restarts_total", "Workers that died or hung and were replaced", "COUNTER"
        )
        self._batch_size = _family(*families.batch, "HISTOGRAM").Metric(
            labels=self._labels, buckets=[float(bucket) for bucket in families.buckets]
        )

    def on_beat(self, beat: Beat) -> None:
        """Take over what the worker has counted."""
        try:
            for key, value in beat.gauges.items():
                self._gauges[key].set(value)
            for key, value in beat.counts.items():
                self._counters[key].increment(value)
            for size in beat.batch_sizes:
                self._batch_size.observe(size)
        except Exception:
            logger.exception("metrics not updated")

    def on_restart(self) -> None:
        """Count a worker that was replaced."""
        self._increment(self._restarts)

    def ended(self, outcome: str) -> None:
        """Count a row that was answered: done, failed or cancelled."""
        self._increment(self._outcomes[outcome])

    def _increment(self, counter: Any) -> None:
        try:
            counter.increment(1)
        except Exception:
            logger.exception("metrics not updated")

    def _metric(self, name: str, description: str, kind: str, **labels: str) -> Any:
        return _family(name, description, kind).Metric(labels={**self._labels, **labels})
