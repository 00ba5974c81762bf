"""Registration of metrics with Triton, which exports them on /metrics."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import triton_python_backend_utils as pb_utils

from genserve_backend.worker.messages import Heartbeat
from genserve_backend.worker.metrics import Counter, Gauge, Histogram, Metric

OUTCOMES = {
    outcome: Counter("genserve_requests_total", "Rows answered, by outcome", (("outcome", outcome),))
    for outcome in ("done", "failed", "cancelled")
}
RESTARTS = Counter("genserve_worker_restarts_total", "Workers that died or hung and were replaced")
INSTANCE_METRICS: tuple[Metric, ...] = (*OUTCOMES.values(), RESTARTS)
"""Metrics of every instance, in addition to those of its engine."""

KINDS = {Gauge: "GAUGE", Counter: "COUNTER", Histogram: "HISTOGRAM"}

logger = logging.getLogger(__name__)

_families: dict[str, Any] = {}
_families_lock = threading.Lock()


def _family(metric: Metric) -> Any:
    """Return the metric's family. A process creates each family once; other processes may have created it as well."""
    with _families_lock:
        if metric.name not in _families:
            kind = getattr(pb_utils.MetricFamily, KINDS[type(metric)])
            _families[metric.name] = pb_utils.MetricFamily(name=metric.name, description=metric.help, kind=kind)
        return _families[metric.name]


class Metrics:
    """The metrics of one instance. Metric failures are logged and never affect a request.

    Args:
        engine: The metrics of the instance's engine.
        model: Label of every metric.
        instance: Label of every metric.
    """

    def __init__(self, engine: Sequence[Metric], model: str, instance: str) -> None:
        self._labels = {"model": model, "instance": instance}
        self._metrics = {metric: self._register(metric) for metric in (*engine, *INSTANCE_METRICS)}

    def update(self, heartbeat: Heartbeat) -> None:
        """Apply the values of a heartbeat."""
        self._safely(lambda: self._apply(heartbeat))

    def restarted(self) -> None:
        """Count a worker that was replaced."""
        self._safely(lambda: self._metrics[RESTARTS].increment(1))

    def finished(self, outcome: str) -> None:
        """Count a row that was answered: done, failed or cancelled."""
        self._safely(lambda: self._metrics[OUTCOMES[outcome]].increment(1))

    def _apply(self, heartbeat: Heartbeat) -> None:
        for gauge, value in heartbeat.gauges.items():
            self._metrics[gauge].set(value)
        for counter, increment in heartbeat.counts.items():
            self._metrics[counter].increment(increment)
        for histogram, values in heartbeat.observations.items():
            for value in values:
                self._metrics[histogram].observe(value)

    @staticmethod
    def _safely(update: Callable[[], None]) -> None:
        try:
            update()
        except Exception:
            logger.exception("cannot update metrics")

    def _register(self, metric: Metric) -> Any:
        labels = self._labels | (dict(metric.labels) if isinstance(metric, Counter) else {})
        options = {"buckets": [float(bucket) for bucket in metric.buckets]} if isinstance(metric, Histogram) else {}
        return _family(metric).Metric(labels=labels, **options)
