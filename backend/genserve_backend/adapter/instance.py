"""One instance of a model: its settings, its worker, its entries on the board."""

from __future__ import annotations

import json
import logging
import math
import sqlite3
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import triton_python_backend_utils as pb_utils

from genserve_backend import logs
from genserve_backend.adapter.balance import Balance
from genserve_backend.adapter.metrics import Families, Metrics
from genserve_backend.adapter.reply import Reply, Row
from genserve_backend.adapter.tensors import Values
from genserve_backend.board import Board
from genserve_backend.checkpoints import CheckpointError
from genserve_backend.errors import Cancelled, InvalidInput, RequestError, ServerError
from genserve_backend.logs import log
from genserve_backend.settings import ModelSettings, SettingsError, load
from genserve_backend.worker.messages import DEFAULT_LEVEL, LEVELS, Beat, Start
from genserve_backend.worker.supervisor import Supervisor, WorkerStartError

MAX_TASK_ID_CHARACTERS = 256
BOARD_POLL_S = 0.1
BALANCE_POLL_S = 0.02
LEVEL_PARAMETER = "priority_level"
"""The request parameter for a request's urgency inside the engine, 1 to 3."""

logger = logging.getLogger(__name__)

SettingsT = TypeVar("SettingsT", bound=ModelSettings)
CheckpointT = TypeVar("CheckpointT")


@dataclass(frozen=True)
class Place:
    """Where an instance runs, as Triton's ``initialize`` arguments tell."""

    model: str
    instance: str
    device: str
    """As torch names it: ``cuda:N`` or ``cpu``."""
    gpu_id: int | None
    parameters: dict[str, str]
    repository: Path

    @classmethod
    def of(cls, args: dict[str, str]) -> Place:
        """Read Triton's arguments."""
        on_gpu = args["model_instance_kind"] == "GPU"
        gpu_id = int(args["model_instance_device_id"]) if on_gpu else None
        config = json.loads(args["model_config"])
        return cls(
            model=args["model_name"],
            instance=args["model_instance_name"],
            device="cpu" if gpu_id is None else f"cuda:{gpu_id}",
            gpu_id=gpu_id,
            parameters={name: value["string_value"] for name, value in config.get("parameters", {}).items()},
            repository=Path(args["model_repository"]).parent,
        )

    def describe(self) -> dict[str, object]:
        """The fields that every INFO has."""
        return {"instance": self.instance, "device": self.device}


class Instance(Generic[SettingsT, CheckpointT]):
    """What a model.py drives.

    Args:
        args: Triton's ``initialize`` arguments.
        settings: The model's settings class.
        read: Reads its checkpoint.
        engine: ``module:factory`` of what the worker runs.
        families: The metrics that it counts for.

    Raises:
        pb_utils.TritonModelException: The model cannot be loaded; one line says why.
    """

    def __init__(
        self,
        args: dict[str, str],
        *,
        settings: type[SettingsT],
        read: Callable[[Path], CheckpointT],
        engine: str,
        families: Families,
    ) -> None:
        logs.configure()
        self.place = Place.of(args)
        try:
            self.settings = load(settings, self.place.parameters, repository=self.place.repository)
            self.checkpoint = read(self.settings.model_path)
            self._board = Board()
            self._board.start_instance(self.place.instance)
            start = Start(engine, self.settings, self.place.device, self.place.instance)
            self.metrics = Metrics(families, self.place.model, self.place.instance)
            self._supervisor = Supervisor(start, self)
            self.balance = Balance(
                self._board, self.place.model, self.place.instance, lambda: self._supervisor.has_room
            )
            self._supervisor.start()
        except (SettingsError, CheckpointError, WorkerStartError) as error:
            raise pb_utils.TritonModelException(f"{self.place.model}: {error}") from None
        self._cancelled_keys: set[int] = set()
        self._board_asked = 0.0

    def take(
        self,
        request: Any,
        *,
        read: Callable[[Any], list[tuple[Values, Any]]],
        build: Callable[[list[Row]], list[Any]],
    ) -> None:
        """Hand a Triton request's rows to the worker; whatever goes wrong becomes its answer.

        Args:
            request: Triton's request.
            read: Gives each row's raw values and the checked engine request that they make; may raise RequestError.
            build: Makes the output tensors.
        """
        reply = Reply(request, build)
        request_id = request.request_id()
        try:
            level = _level(request.parameters())
            rows = read(request)
            ids = [_task_id(values, request_id, row, len(rows)) for row, (values, _) in enumerate(rows)]
        except RequestError as error:
            log(logger, logging.INFO, "request refused", request_id=request_id or None, error=error.wire_message)
            reply.fail(error)
            return
        except Exception:
            logger.exception("request could not be read")
            reply.fail(ServerError("the request could not be read; see the server's log"))
            return
        timeout_s = min(request.timeout() / 1e6 or math.inf, self.settings.task_timeout_s)
        deadline = time.monotonic() + timeout_s
        reply.expect(len(rows))
        for index, (task_id, (_, engine_request)) in enumerate(zip(ids, rows, strict=True)):
            try:
                task = RowTask(self, reply, index, task_id, engine_request)
            except sqlite3.Error:
                logger.exception("board could not be written", extra={"fields": {"task_id": task_id}})
                reply.fail(ServerError("the board could not be written; see the server's log"))
                return
            self._supervisor.submit(task, engine_request, deadline=deadline, level=level)

    def wait_for_slot(self) -> None:
        """Block while the instance is full, so that Triton's queue keeps what waits, by its priorities.

        And while another instance has less to do and room, so that it gets the next request.
        """
        self._supervisor.wait_for_slot()
        self.balance.publish()
        while self.balance.another_is_freer() and not self._supervisor.is_closing:
            time.sleep(BALANCE_POLL_S)

    def on_beat(self, beat: Beat) -> None:
        """The worker lives, and tells what it has done."""
        self.metrics.on_beat(beat)
        self.balance.publish()

    def on_restart(self) -> None:
        """The worker is being replaced."""
        self.metrics.on_restart()
        self.balance.publish()

    def close(self) -> None:
        """End the worker."""
        self._supervisor.close()
        self._board.close()

    @property
    def board(self) -> Board:
        """The board of this server."""
        return self._board

    def cancelled_on_board(self, key: int) -> bool:
        """Whether somebody asked `tasks` to cancel the entry. The board is read a few times a second, for all."""
        now = time.monotonic()
        if now - self._board_asked >= BOARD_POLL_S:
            self._board_asked = now
            self._cancelled_keys = self._board.cancel_requested(self.place.instance)
        return key in self._cancelled_keys


class RowTask:
    """A row on its way through the worker: keeps the board up to date and fills its place in the reply."""

    def __init__(self, instance: Instance[Any, Any], reply: Reply, index: int, task_id: str, request: Any) -> None:
        self.task_id = task_id
        self._instance = instance
        self._reply = reply
        self._index = index
        self._request = request
        self._arrived = time.monotonic()
        place = instance.place
        self._key = instance.board.add(task_id, model=place.model, instance=place.instance)
        instance.balance.set(self._key, request.work)

    def is_cancelled(self) -> bool:
        """Whether the caller has gone, over gRPC, or somebody has cancelled the task through `tasks`."""
        return self._instance.cancelled_on_board(self._key) or self._reply.is_abandoned()

    def on_progress(self, step: int, steps: int, preview: bytes) -> None:
        """Show it on the board."""
        self._instance.board.progress(self._key, step, steps, preview)
        self._instance.balance.set(self._key, self._request.work * (1 - step / steps))

    def on_done(self, result: Any) -> None:
        """Fill the row of the reply."""
        self._end("done")
        try:
            self._reply.row_done(self._index, Row(self.task_id, self._request, result))
        except Exception:
            logger.exception("answer could not be built", extra={"fields": {"task_id": self.task_id}})
            self._reply.fail(ServerError("the answer could not be built; see the server's log"))

    def on_failed(self, error: RequestError) -> None:
        """Fail the reply: a Triton request has one answer, so its rows fail together."""
        self._end("cancelled" if isinstance(error, Cancelled) else "failed", error.wire_message)
        self._reply.fail(error)

    def _end(self, state: str, error: str | None = None) -> None:
        """Log the end and show it on the board; a board that cannot be written costs nobody the answer."""
        place = self._instance.place
        self._instance.balance.drop(self._key)
        self._instance.metrics.ended(state)
        log(
            logger,
            logging.INFO,
            f"request {state}",
            task_id=self.task_id,
            model=place.model,
            instance=place.instance,
            seconds=time.monotonic() - self._arrived,
            error=error,
        )
        try:
            self._instance.board.finish(self._key, state, error)
        except sqlite3.Error:
            logger.exception("board could not be written", extra={"fields": {"task_id": self.task_id}})


def _level(parameters: str) -> int:
    """The priority level that a request names for the engine: Triton does not tell a model the one it queued it by."""
    value = json.loads(parameters or "{}").get(LEVEL_PARAMETER, DEFAULT_LEVEL)
    if value not in LEVELS:
        raise InvalidInput.of(LEVEL_PARAMETER, value, f"{LEVELS[0]} to {LEVELS[-1]}")
    return int(value)


def _task_id(values: Values, request_id: str, row: int, rows: int) -> str:
    """The caller's TASK_ID, else the request id (with the row's number where there are several), else a new one."""
    task_id = values.get("TASK_ID", "")
    if len(task_id) > MAX_TASK_ID_CHARACTERS:
        raise InvalidInput.of("TASK_ID", f"{len(task_id):,} characters long", f"0 to {MAX_TASK_ID_CHARACTERS}")
    fallback = f"{request_id}/{row}" if request_id and rows > 1 else request_id
    return task_id or fallback[:MAX_TASK_ID_CHARACTERS] or uuid.uuid4().hex
