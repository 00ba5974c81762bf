"""Load balancing between instances: the next request goes to the one with the smallest backlog.

Triton gives a request to the instance that has been waiting longest for one, idle or not. An instance with a backlog
therefore stays in its ``execute()`` while another one is idle, or has a backlog that is smaller by more than one
request. Without that margin, instances would alternate, each waiting for the other to publish its backlog.
"""

from __future__ import annotations

import logging
import sqlite3
import sys
import threading
import time
from collections.abc import Callable

from genserve_backend.board import Board

PUBLISH_S = 0.5
"""Minimum interval between two updates of an instance's backlog on the board, in seconds."""

logger = logging.getLogger(__name__)


class Balance:
    """The backlog of one instance, published on the board. Each model has its own unit of work.

    If the board cannot be read or written, the choice is Triton's.

    Args:
        board: The board of the server.
        model: The model; only its instances are compared.
        instance: This instance.
        has_room: Returns whether this instance could accept another request now.
    """

    def __init__(self, board: Board, model: str, instance: str, has_room: Callable[[], bool]) -> None:
        self._board = board
        self._model = model
        self._instance = instance
        self._lock = threading.Lock()
        self._work: dict[int, float] = {}
        self._has_room = has_room
        self._published = 0.0
        self._margin = 0.0
        """Work of the last request that arrived."""

    def set(self, key: int, work: float) -> None:
        """Set the remaining work of a request."""
        with self._lock:
            is_new = key not in self._work
            self._work[key] = work
            if is_new:
                self._margin = work
        if is_new or time.monotonic() - self._published >= PUBLISH_S:
            self.publish()

    def drop(self, key: int) -> None:
        """Remove a request that has ended."""
        with self._lock:
            self._work.pop(key, None)
        self.publish()

    def publish(self) -> None:
        """Publish the backlog; also a sign of life for other instances."""
        self._published = time.monotonic()
        try:
            self._board.set_load(self._instance, model=self._model, load=self._load(), has_room=self._has_room())
        except sqlite3.Error:
            logger.exception("cannot write the board")

    def should_yield(self) -> bool:
        """Return whether another instance should get the next request."""
        load = self._load()
        if not load:
            return False
        try:
            return self._board.has_less_loaded(
                self._instance, model=self._model, load=max(load - self._margin, sys.float_info.min)
            )
        except sqlite3.Error:
            logger.exception("cannot read the board")
            return False

    def _load(self) -> float:
        with self._lock:
            return sum(self._work.values())
