"""Reports of the rerank engine: progress for callers, metrics for operators."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

import torch

from genserve_backend.devices import memory
from genserve_backend.rerank.metrics import (
    BATCH_TOKENS,
    CACHE_HITS,
    FORWARD_SECONDS,
    PADDING_TOKENS,
    PAIRS,
    PREFIX_TOKENS_SAVED,
    QUEUE_SECONDS,
    TOKENS,
)
from genserve_backend.rerank.state import BatchItem, RequestState
from genserve_backend.worker.engine import Emit, HeartbeatTimer
from genserve_backend.worker.messages import Heartbeat
from genserve_backend.worker.metrics import RUNNING, WAITING, Counter, memory_gauges
from genserve_backend.worker.scheduling import ProgressTimer


class Reporter:
    """Progress and metrics.

    Args:
        device: Its memory is reported.
        emit: Receives the heartbeats.
    """

    def __init__(self, *, device: torch.device, emit: Emit) -> None:
        self._device = device
        self._heartbeat_timer = HeartbeatTimer(emit, self._heartbeat)
        self._progress_timer = ProgressTimer()
        self._counts: defaultdict[Counter, float] = defaultdict(float)
        self._batch_tokens: list[int] = []
        self._running = self._waiting = 0
        self._stalled_s = 0.0

    def cached(self, documents: int) -> None:
        """Count documents whose score was cached."""
        self._counts[CACHE_HITS] += documents

    def started(self, waited_s: float) -> None:
        """Count the queue time of a request whose first forward starts."""
        self._counts[QUEUE_SECONDS] += waited_s

    def stepped(
        self,
        batch: Sequence[BatchItem],
        *,
        seconds: float,
        padded: bool,
        prefix_tokens_computed: int,
        prefix_tokens_reused: int,
    ) -> None:
        """Count a forward for `batch` that took `seconds`.

        Args:
            batch: The sequences.
            seconds: Duration of the forward.
            padded: Whether the sequences were padded to the longest.
            prefix_tokens_computed: See `Scorer`; only those of this forward.
            prefix_tokens_reused: The same.
        """
        tokens = sum(item.length for item in batch)
        longest = max(item.length for item in batch)
        skipped = sum(len(item.sequence.ids) - item.length for item in batch)
        self._counts[PAIRS] += sum(item.sequence.document is not None for item in batch)
        self._counts[TOKENS] += tokens + prefix_tokens_computed - prefix_tokens_reused
        self._counts[PREFIX_TOKENS_SAVED] += max(0, skipped - prefix_tokens_computed) + prefix_tokens_reused
        self._counts[PADDING_TOKENS] += longest * len(batch) - tokens if padded else 0
        self._counts[FORWARD_SECONDS] += seconds
        self._batch_tokens.append(tokens)

    def report(self, states: Collection[RequestState], *, stalled_s: float) -> None:
        """Send what is due: progress and a heartbeat. Call it after every forward.

        Args:
            states: All requests in the engine.
            stalled_s: Seconds that the tokenization thread has spent on its current slice.
        """
        self._stalled_s = stalled_s
        self._running = sum(state.has_started for state in states)
        self._waiting = len(states) - self._running
        if self._progress_timer.is_due():
            for state in states:
                if state.has_started and state.documents_done > state.documents_reported:
                    state.documents_reported = state.documents_done
                    state.job.progress(state.documents_done, len(state.request.documents))
        self._heartbeat_timer.beat()

    def _heartbeat(self) -> Heartbeat:
        gauges = {RUNNING: self._running, WAITING: self._waiting, **memory_gauges(memory(self._device))}
        counts = dict(self._counts)
        observations = {BATCH_TOKENS: tuple(self._batch_tokens)}
        self._counts.clear()
        self._batch_tokens.clear()
        return Heartbeat(gauges, counts, observations, stalled_s=self._stalled_s)
