"""Replies: the single answer that every Triton request gets."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import triton_python_backend_utils as pb_utils

from genserve_backend.adapter.rows import AnsweredRow
from genserve_backend.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidInput,
    OutOfMemory,
    RequestError,
    ServerError,
    ServerUnavailable,
)
from genserve_backend.logs import log

logger = logging.getLogger(__name__)

CODES = {
    InvalidInput: "INVALID_ARG",
    Cancelled: "CANCELLED",
    DeadlineExceeded: "UNAVAILABLE",
    OutOfMemory: "UNAVAILABLE",
    ServerUnavailable: "UNAVAILABLE",
    ServerError: "INTERNAL",
}
"""The error table of the contract: error class to code of pb_utils.TritonError.

Codes are names, because Triton completes its module only after it has imported the model.
"""
CANCEL_POLL_S = 0.2
"""Minimum interval between two checks whether the caller is gone, in seconds. A check costs a message between
processes, so one check serves all rows."""


def error_response(error: RequestError) -> Any:
    """Return Triton's response for an error."""
    code = getattr(pb_utils.TritonError, CODES[type(error)])
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(error.wire_message, code))


class Reply:
    """The answer of one request, sent once when all rows are done or one has failed.

    The request itself may be gone by then: Triton accepts the answer through its response sender.

    Args:
        request: Triton's request.
        build: Builds the output tensors from the rows, in order.
    """

    def __init__(self, request: Any, build: Callable[[list[AnsweredRow]], list[Any]]) -> None:
        self._sender = request.get_response_sender()
        self._request_id = request.request_id()
        self._build = build
        self._rows: dict[int, AnsweredRow] = {}
        self._expected = 0
        self._sent = False
        self._cancelled = False
        self._checked = 0.0

    @contextmanager
    def catch_errors(self) -> Iterator[None]:
        """Answer with any error that the block raises."""
        try:
            yield
        except RequestError as error:
            log(logger, logging.INFO, "request rejected", request_id=self._request_id or None, error=error.wire_message)
            self.fail(error)
        except Exception:
            logger.exception("cannot submit the request")
            self.fail(ServerError("the request could not be submitted; see the server's log"))

    def expect(self, rows: int) -> None:
        """Set the number of rows, before the first one ends."""
        self._expected = rows

    def row_done(self, index: int, row: AnsweredRow) -> None:
        """Add a row; the last one sends the answer."""
        self._rows[index] = row
        if len(self._rows) == self._expected:
            tensors = self._build([self._rows[index] for index in range(self._expected)])
            self._send(pb_utils.InferenceResponse(output_tensors=tensors))

    def fail(self, error: RequestError) -> None:
        """Answer with an error. `is_abandoned` then stops the rows that still run."""
        self._send(error_response(error))

    def is_abandoned(self) -> bool:
        """Return whether the caller has cancelled, or already has its answer."""
        if self._sent:
            return True
        now = time.monotonic()
        if not self._cancelled and now - self._checked >= CANCEL_POLL_S:
            self._checked = now
            self._cancelled = bool(self._sender.is_cancelled())
        return self._cancelled

    def _send(self, response: Any) -> None:
        if self._sent:
            return
        self._sent = True
        try:
            self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception:
            # The caller is gone or Triton is shutting down; the instance has to go on.
            logger.exception("answer not sent")
