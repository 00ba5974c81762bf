"""The one answer that every Triton request gets."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import triton_python_backend_utils as pb_utils

from genserve_backend.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidInput,
    OutOfMemory,
    RequestError,
    ServerError,
    ServerUnavailable,
)

logger = logging.getLogger(__name__)

CODES = {
    InvalidInput: "INVALID_ARG",
    Cancelled: "CANCELLED",
    DeadlineExceeded: "UNAVAILABLE",
    OutOfMemory: "UNAVAILABLE",
    ServerUnavailable: "UNAVAILABLE",
    ServerError: "INTERNAL",
}
"""The error table of the contract: which of pb_utils.TritonError's codes a kind of error travels under.

By name, as Triton completes its module only after it has imported the model.
"""
CANCEL_POLL_S = 0.2
"""Asking Triton whether a caller has gone costs a message between processes, so one answer serves all rows."""


class Row(NamedTuple):
    """One row of a request that went well."""

    task_id: str
    request: Any
    result: Any


def error_response(error: RequestError) -> Any:
    """An error as Triton sends it."""
    code = getattr(pb_utils.TritonError, CODES[type(error)])
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(error.wire_message, code))


class Reply:
    """Collects the rows of one request and answers it once.

    The request itself may be gone by then: Triton takes the answer through its response sender.

    Args:
        request: Triton's request.
        build: Makes the output tensors from the rows, in order.
    """

    def __init__(self, request: Any, build: Callable[[list[Row]], list[Any]]) -> None:
        self._sender = request.get_response_sender()
        self._build = build
        self._rows: dict[int, Row] = {}
        self._expected = 0
        self._sent = False
        self._cancelled = False
        self._asked = 0.0

    def expect(self, rows: int) -> None:
        """Say how many rows there will be, before the first one ends."""
        self._expected = rows

    def row_done(self, index: int, row: Row) -> None:
        """Take a row; the last one sends the answer."""
        self._rows[index] = row
        if len(self._rows) == self._expected:
            tensors = self._build([self._rows[index] for index in range(self._expected)])
            self._send(pb_utils.InferenceResponse(output_tensors=tensors))

    def fail(self, error: RequestError) -> None:
        """Answer with an error. The rows that still run have nobody to run for: `is_abandoned` tells them."""
        self._send(error_response(error))

    def is_abandoned(self) -> bool:
        """Whether the caller has cancelled, or has its answer already."""
        if self._sent:
            return True
        now = time.monotonic()
        if not self._cancelled and now - self._asked >= CANCEL_POLL_S:
            self._asked = now
            self._cancelled = bool(self._sender.is_cancelled())
        return self._cancelled

    def _send(self, response: Any) -> None:
        if self._sent:
            return
        self._sent = True
        try:
            self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception:
            # The caller is gone or Triton is going down; neither may take the instance along.
            logger.exception("answer not sent")
