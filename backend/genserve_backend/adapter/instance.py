"""One instance of a model: its settings, its worker, its records."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import triton_python_backend_utils as pb_utils

from genserve_backend import logs
from genserve_backend.adapter.balance import Balance
from genserve_backend.adapter.metrics import Metrics
from genserve_backend.adapter.place import Place
from genserve_backend.adapter.presence import Presence
from genserve_backend.adapter.reply import Reply
from genserve_backend.adapter.rows import ParsedRow, RequestOptions
from genserve_backend.adapter.task import Records, RowTask
from genserve_backend.board import Board
from genserve_backend.checkpoints import CheckpointError
from genserve_backend.errors import ServerError
from genserve_backend.settings import ModelSettings, SettingsError, in_force, load
from genserve_backend.worker.messages import Heartbeat, Start
from genserve_backend.worker.metrics import Metric
from genserve_backend.worker.supervisor import Supervisor, WorkerStartError

BALANCE_POLL_S = 0.02
"""Interval between two checks of other instances' backlogs, in seconds."""

logger = logging.getLogger(__name__)

SettingsT = TypeVar("SettingsT", bound=ModelSettings)
CheckpointT = TypeVar("CheckpointT")


class Instance(Generic[SettingsT, CheckpointT]):
    """The instance behind a model.py.

    Args:
        args: Triton's ``initialize`` arguments.
        settings: The model's settings class.
        load_checkpoint: Loads the properties of the model's checkpoint.
        engine: ``module:factory`` of the engine that the worker runs.
        metrics: The engine's metrics.

    Raises:
        pb_utils.TritonModelException: The model cannot be loaded; the message is one line.
    """

    def __init__(
        self,
        args: dict[str, str],
        *,
        settings: type[SettingsT],
        load_checkpoint: Callable[[Path], CheckpointT],
        engine: str,
        metrics: Sequence[Metric],
    ) -> None:
        logs.configure()
        self.place = place = Place.of(args)
        try:
            self.settings = load(settings, place.parameters, repository=place.repository)
            self.checkpoint = load_checkpoint(self.settings.model_path)
            self._board = Board()
            self._board.start_instance(place.instance)
            self._board.set_settings(place.model, in_force(self.settings, place.parameters, device=place.device))
            self._supervisor = supervisor = Supervisor(Start(engine, self.settings, place.device, place.instance))
            self._balance = Balance(self._board, place.model, place.instance, lambda: supervisor.has_room)
            instance_metrics = Metrics(metrics, place.model, place.instance)
            self._records = Records(place, board=self._board, metrics=instance_metrics, balance=self._balance)
            presence = Presence(self._board, place)
            self._supervisor.start(WorkerMonitor(instance_metrics, self._balance, presence))
        except (SettingsError, CheckpointError, WorkerStartError) as error:
            raise pb_utils.TritonModelException(f"{place.model}: {error}") from None

    def submit(self, reply: Reply, rows: Sequence[ParsedRow], options: RequestOptions) -> None:
        """Submit the rows of a request to the worker; they fill `reply`."""
        limit_s = self.settings.task_timeout_s
        deadline = time.monotonic() + min(options.timeout_s, limit_s)
        has_own_deadline = options.timeout_s < limit_s
        reply.expect(len(rows))
        for index, row in enumerate(rows):
            try:
                task = RowTask(self._records, reply, index, row)
            except sqlite3.Error:
                logger.exception("cannot write the board", extra={"fields": {"task_id": row.task_id}})
                reply.fail(ServerError("the board could not be written; see the server's log"))
                return
            self._supervisor.submit(
                task, row.request, deadline=deadline, level=options.level, has_own_deadline=has_own_deadline
            )

    def wait_for_slot(self) -> None:
        """Block while the instance is full, or while another instance should get the next request.

        Waiting requests thus stay in Triton's queue, which sorts them by priority.
        """
        self._supervisor.wait_for_slot()
        self._balance.publish()
        while self._balance.should_yield() and not self._supervisor.is_closing:
            time.sleep(BALANCE_POLL_S)

    def close(self) -> None:
        """End the worker."""
        self._supervisor.close()
        try:
            self._board.remove_instance(self.place.instance)
        except sqlite3.Error:
            logger.exception("cannot write the board")
        self._board.close()


class WorkerMonitor:
    """Updates metrics, backlog and presence from the worker's heartbeats; a `worker.callbacks.Monitor`.

    Args:
        metrics: The metrics of the instance.
        balance: The backlog of the instance.
        presence: The state of the instance.
    """

    def __init__(self, metrics: Metrics, balance: Balance, presence: Presence) -> None:
        self._metrics = metrics
        self._balance = balance
        self._presence = presence

    def on_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Update all of them."""
        self._metrics.update(heartbeat)
        self._balance.publish()
        self._presence.update(heartbeat.gauges)

    def on_restart(self) -> None:
        """Count the restart, and publish that there is no room."""
        self._metrics.restarted()
        self._balance.publish()

    def on_poll(self, *, ready: bool) -> None:
        """Publish that the instance lives."""
        self._presence.publish(ready=ready)
