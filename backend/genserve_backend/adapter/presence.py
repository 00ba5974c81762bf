"""Presence of an instance: the state that it publishes on the board, for callers that ask for the load."""

from __future__ import annotations

import logging
import math
import sqlite3
import time
from collections.abc import Mapping

from genserve_backend.adapter.place import Place
from genserve_backend.board import Board, Memory
from genserve_backend.worker.metrics import Gauge, memory_of

PUBLISH_S = 1.0
"""Minimum interval between two updates of an unchanged state, in seconds."""

logger = logging.getLogger(__name__)


class Presence:
    """The state of one instance, published on the board. If the board cannot be written, the failure is logged.

    Args:
        board: The board of the server.
        place: The instance.
    """

    def __init__(self, board: Board, place: Place) -> None:
        self._board = board
        self._place = place
        self._memory = Memory()
        self._published = -math.inf
        self._was_ready: bool | None = None

    def update(self, gauges: Mapping[Gauge, float]) -> None:
        """Set the memory from the gauges of a heartbeat."""
        if self._memory.used is None:
            self._published = -math.inf  # the first size after a start is news
        self._memory = memory_of(gauges)

    def publish(self, *, ready: bool) -> None:
        """Publish the state if a second has passed, or if `ready` has changed. Cheap: call it often.

        Without a ready worker, the memory is unknown.
        """
        now = time.monotonic()
        if ready == self._was_ready and now - self._published < PUBLISH_S:
            return
        if not ready:
            self._memory = Memory()
        self._was_ready, self._published = ready, now
        place = self._place
        try:
            self._board.set_instance(
                place.instance,
                model=place.model,
                device=place.device,
                gpu_id=place.gpu_id,
                memory=self._memory,
                ready=ready,
            )
        except sqlite3.Error:
            logger.exception("cannot write the board")
