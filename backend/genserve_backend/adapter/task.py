"""Tasks: the rows that an instance works on, with their entries on the board, in the metrics and in the backlog."""

from __future__ import annotations

import logging
import sqlite3
import time
from typing import Any

from genserve_backend.adapter.balance import Balance
from genserve_backend.adapter.metrics import Metrics
from genserve_backend.adapter.place import Place
from genserve_backend.adapter.reply import Reply
from genserve_backend.adapter.rows import AnsweredRow, ParsedRow
from genserve_backend.board import Board
from genserve_backend.errors import Cancelled, RequestError, ServerError
from genserve_backend.logs import log

BOARD_POLL_S = 0.1
"""Minimum interval between two reads of the cancellations on the board, in seconds."""

logger = logging.getLogger(__name__)


class Records:
    """The records of an instance's tasks: board, metrics and backlog.

    Args:
        place: The instance.
        board: The board of the server.
        metrics: The metrics of the instance.
        balance: The backlog of the instance.
    """

    def __init__(self, place: Place, *, board: Board, metrics: Metrics, balance: Balance) -> None:
        self._place = place
        self._board = board
        self._metrics = metrics
        self._balance = balance
        self._cancelled: set[int] = set()
        self._polled = 0.0

    def add(self, task_id: str, work: float) -> int:
        """Record a new task, and return its key."""
        key = self._board.add(task_id, model=self._place.model, instance=self._place.instance)
        self._balance.set(key, work)
        return key

    def is_cancelled(self, key: int) -> bool:
        """Return whether somebody has cancelled the task through the `tasks` model.

        One query, a few times a second, serves all tasks.
        """
        now = time.monotonic()
        if now - self._polled >= BOARD_POLL_S:
            self._polled = now
            self._cancelled = self._board.cancel_requested(self._place.instance)
        return key in self._cancelled

    def progress(self, key: int, step: int, steps: int, preview: bytes, *, work_left: float) -> None:
        """Record a task's progress."""
        self._board.progress(key, step, steps, preview)
        self._balance.set(key, work_left)

    def finish(self, key: int, task_id: str, state: str, *, seconds: float, error: str | None) -> None:
        """Record and log the end of a task as `state`. A board failure is logged; the request still gets its answer."""
        self._balance.drop(key)
        self._metrics.finished(state)
        log(
            logger,
            logging.INFO,
            f"request {state}",
            task_id=task_id,
            model=self._place.model,
            instance=self._place.instance,
            seconds=seconds,
            error=error,
        )
        try:
            self._board.finish(key, state, error)
        except sqlite3.Error:
            logger.exception("cannot write the board", extra={"fields": {"task_id": task_id}})


class RowTask:
    """A row that the worker runs: a `worker.callbacks.Task` that records its state and fills its part of the reply.

    Args:
        records: The records of the instance.
        reply: The reply of the row's request.
        index: The row's index in the request.
        row: The row.
    """

    def __init__(self, records: Records, reply: Reply, index: int, row: ParsedRow) -> None:
        self._records = records
        self._reply = reply
        self._index = index
        self._row = row
        self._arrived = time.monotonic()
        self._key = records.add(row.task_id, row.request.work)

    @property
    def task_id(self) -> str:
        """Id in the logs."""
        return self._row.task_id

    def is_cancelled(self) -> bool:
        """Return whether the caller is gone (over gRPC), or somebody has cancelled the task."""
        return self._records.is_cancelled(self._key) or self._reply.is_abandoned()

    def on_progress(self, step: int, steps: int, preview: bytes) -> None:
        """Record the progress."""
        work_left = self._row.request.work * (1 - step / steps)
        self._records.progress(self._key, step, steps, preview, work_left=work_left)

    def on_done(self, result: Any) -> None:
        """Fill the row of the reply."""
        self._finish("done")
        try:
            self._reply.row_done(self._index, AnsweredRow(self.task_id, self._row.request, result))
        except Exception:
            logger.exception("cannot build the answer", extra={"fields": {"task_id": self.task_id}})
            self._reply.fail(ServerError("the answer could not be built; see the server's log"))

    def on_failed(self, error: RequestError) -> None:
        """Fail the reply: a Triton request has one answer, so its rows fail together."""
        self._finish("cancelled" if isinstance(error, Cancelled) else "failed", error.wire_message)
        self._reply.fail(error)

    def _finish(self, state: str, error: str | None = None) -> None:
        seconds = time.monotonic() - self._arrived
        self._records.finish(self._key, self.task_id, state, seconds=seconds, error=error)
