"""What the engine tells about its work: progress for callers, numbers for operators."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Sequence

import torch

from genserve_backend.devices import memory_bytes
from genserve_backend.rerank.pool import Piece, Ranking
from genserve_backend.worker.engine import PROGRESS_S, Emit, Pulse
from genserve_backend.worker.messages import Beat


class Reporter:
    """Collects what happens and passes it on now and then.

    Args:
        device: Whose memory is reported.
        emit: Where events go.
    """

    def __init__(self, *, device: torch.device, emit: Emit) -> None:
        self._device = device
        self._pulse = Pulse(emit, self._beat)
        self._counts: Counter[str] = Counter()
        self._forward_s = self._queue_s = 0.0
        self._batch_tokens: list[int] = []
        self._running = self._waiting = 0
        self._stalled_s = self._reported = 0.0

    def known(self, pairs: int) -> None:
        """So many pairs need no forward."""
        self._counts["cache_hits"] += pairs

    def began(self, waited_s: float) -> None:
        """The first forward of a request begins."""
        self._queue_s += waited_s

    def ran(self, pieces: Sequence[Piece], *, seconds: float, padded: bool, prefix_tokens: int) -> None:
        """A forward of these sequences took `seconds`, the reading of so many tokens of their prefixes among them."""
        tokens = sum(piece.length for piece in pieces)
        width = max(piece.length for piece in pieces)
        self._counts["pairs"] += sum(piece.sequence.document is not None for piece in pieces)
        self._counts["tokens"] += tokens + prefix_tokens
        shared = sum(len(piece.sequence.ids) - piece.length for piece in pieces)
        self._counts["prefix_tokens_saved"] += max(0, shared - prefix_tokens)
        self._counts["padding_tokens"] += width * len(pieces) - tokens if padded else 0
        self._forward_s += seconds
        self._batch_tokens.append(tokens)

    def report(self, rankings: Collection[Ranking], *, stalled_s: float) -> None:
        """Report progress where it is due; call it after every forward.

        Args:
            rankings: All requests.
            stalled_s: Seconds that the tokenizing thread has spent on its current slice.
        """
        self._stalled_s = stalled_s
        self._running = sum(ranking.started is not None for ranking in rankings)
        self._waiting = len(rankings) - self._running
        now = time.monotonic()
        if now - self._reported >= PROGRESS_S:
            self._reported = now
            for ranking in rankings:
                if ranking.started is not None and ranking.documents_done > ranking.documents_reported:
                    ranking.documents_reported = ranking.documents_done
                    ranking.job.progress(ranking.documents_done, len(ranking.request.documents))
        self._pulse.beat()

    def _beat(self) -> Beat:
        counts = {**self._counts, "forward_seconds": self._forward_s, "queue_seconds": self._queue_s}
        sizes = tuple(self._batch_tokens)
        self._counts.clear()
        self._forward_s = self._queue_s = 0.0
        self._batch_tokens.clear()
        gauges = {
            "running": self._running,
            "waiting": self._waiting,
            "device_memory_bytes": memory_bytes(self._device),
        }
        return Beat(gauges, counts, sizes, self._stalled_s)
