"""Rows of a Triton request, and the options that all rows of a request share."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from genserve_backend.adapter.tensors import Values
from genserve_backend.errors import InvalidInput
from genserve_backend.worker.messages import DEFAULT_LEVEL, LEVELS

MAX_TASK_ID_CHARACTERS = 256
LEVEL_PARAMETER = "priority_level"
"""Request parameter for the priority level inside the engine, 1 to 3."""


class EngineRequest(Protocol):
    """A checked request, ready for an engine."""

    @property
    def work(self) -> float:
        """Estimated cost, in a unit of the model."""


@dataclass(frozen=True)
class ParsedRow:
    """A row of a request, ready to be submitted."""

    task_id: str
    request: EngineRequest


@dataclass(frozen=True)
class AnsweredRow:
    """A row of a request with its result."""

    task_id: str
    request: Any
    result: Any


@dataclass(frozen=True)
class RequestOptions:
    """Options of a Triton request that are not tensors."""

    level: int
    """Priority level, 1 is the most urgent."""
    timeout_s: float
    """Infinite if the request sets none."""


def parse_options(request: Any) -> RequestOptions:
    """Parse a Triton request's parameters and timeout.

    Triton does not tell a model the priority by which it queued the request, so the engine's level is a parameter.

    Raises:
        InvalidInput: The priority level is out of range.
    """
    level = json.loads(request.parameters() or "{}").get(LEVEL_PARAMETER, DEFAULT_LEVEL)
    if level not in LEVELS:
        raise InvalidInput.of(LEVEL_PARAMETER, level, f"{LEVELS[0]} to {LEVELS[-1]}")
    return RequestOptions(int(level), request.timeout() / 1e6 or math.inf)


def task_ids(rows: Sequence[Values], request_id: str) -> list[str]:
    """Return a task id per row: its TASK_ID, else the request id (with the row's index if there are several), else new.

    Raises:
        InvalidInput: A TASK_ID is too long.
    """
    return [
        _task_id(values.get("TASK_ID", ""), f"{request_id}/{index}" if request_id and len(rows) > 1 else request_id)
        for index, values in enumerate(rows)
    ]


def _task_id(task_id: str, fallback: str) -> str:
    if len(task_id) > MAX_TASK_ID_CHARACTERS:
        raise InvalidInput.of("TASK_ID", f"{len(task_id):,} characters long", f"0 to {MAX_TASK_ID_CHARACTERS}")
    return task_id or fallback[:MAX_TASK_ID_CHARACTERS] or uuid.uuid4().hex
