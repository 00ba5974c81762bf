"""Which instance takes the next request: the one with the least work before it.

Triton gives a request to the instance that has been waiting longest for one, idle or not. So an instance that has more
to do than another one stays in its ``execute()`` until that is no longer so.
"""

from __future__ import annotations

import logging
import sqlite3
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

    def set(self, key: int, work: float) -> None:
        """Note what is left to do for a request."""
        with self._lock:
            is_new = key not in self._work
            self._work[key] = work
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
        try:
            return self._board.has_freer(self._instance, model=self._model, load=self._load())
        except sqlite3.Error:
            logger.exception("board could not be read")
            return False

    def _load(self) -> float:
        with self._lock:
            return sum(self._work.values())
