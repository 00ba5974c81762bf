"""Which instance takes the next request: the one with the least work before it.

Triton gives a request to the instance that has been waiting longest for one, idle or not. So an instance with work
stays in its ``execute()`` while another one is idle, or has less to do by more than a request's work. Without that
margin instances would take turns one request at a time, each waiting for the other's note on the board.
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
"""Seconds between two notes of an instance's progress."""

logger = logging.getLogger(__name__)


class Balance:
    """The work before one instance, in a unit of its model's own, as the others see it on the board.

    A board that cannot be written or read leaves the choice to Triton.

    Args:
        board: Where the instances of a server meet.
        model: Instances of one model compare themselves.
        instance: This one.
        has_room: Tells whether it could take another request now.
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
        """Work of the last request that came."""

    def set(self, key: int, work: float) -> None:
        """Note what is left to do for a request."""
        with self._lock:
            is_new = key not in self._work
            self._work[key] = work
            if is_new:
                self._margin = work
        if is_new or time.monotonic() - self._published >= PUBLISH_S:
            self.publish()

    def drop(self, key: int) -> None:
        """Forget a request that has ended."""
        with self._lock:
            self._work.pop(key, None)
        self.publish()

    def publish(self) -> None:
        """Tell the others; also a sign of life."""
        self._published = time.monotonic()
        try:
            self._board.set_load(self._instance, model=self._model, load=self._load(), has_room=self._has_room())
        except sqlite3.Error:
            logger.exception("board could not be written")

    def another_is_freer(self) -> bool:
        """Whether another instance should take the next request."""
        load = self._load()
        if not load:
            return False
        try:
            return self._board.has_freer(
                self._instance, model=self._model, load=max(load - self._margin, sys.float_info.min)
            )
        except sqlite3.Error:
            logger.exception("board could not be read")
            return False

    def _load(self) -> float:
        with self._lock:
            return sum(self._work.values())
