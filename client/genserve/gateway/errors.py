"""Errors of the gateway: status codes, and bodies in the shape of each dialect."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from genserve.errors import (
    Cancelled,
    DeadlineExceeded,
    GenServeError,
    InvalidInput,
    NotAllowed,
    OutOfMemory,
    QueueFull,
    ServerUnavailable,
)

STATUSES: tuple[tuple[type[GenServeError], int], ...] = (
    (InvalidInput, HTTPStatus.BAD_REQUEST),
    (NotAllowed, HTTPStatus.FORBIDDEN),
    (QueueFull, HTTPStatus.SERVICE_UNAVAILABLE),
    (DeadlineExceeded, HTTPStatus.SERVICE_UNAVAILABLE),
    (OutOfMemory, HTTPStatus.SERVICE_UNAVAILABLE),
    (ServerUnavailable, HTTPStatus.SERVICE_UNAVAILABLE),
    (Cancelled, 499),  # nginx's status for a request whose caller has gone
)
"""Status of each exception of the client; others are 500."""
RETRYABLE = (QueueFull, ServerUnavailable)
"""Exceptions after which the same request may succeed a little later."""


@dataclass(frozen=True)
class Failure(Exception):
    """Failed request, ready for the shape of any dialect.

    Attributes:
        status: HTTP status.
        kind: Name of the error, as ``InvalidInput``.
        message: One sentence for the caller.
        headers: Further headers of the answer, as Retry-After.
    """

    status: int
    kind: str
    message: str
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, error: GenServeError, *, retry_after_s: float) -> Failure:
        """Return the failure for an exception of the client."""
        status = next((status for kind, status in STATUSES if isinstance(error, kind)), 500)
        headers = {}
        if isinstance(error, RETRYABLE):
            told = getattr(error, "retry_after", None)
            headers["Retry-After"] = str(math.ceil(retry_after_s if told is None else told))
        return cls(status, type(error).__name__, str(error), headers)


Shape = Callable[[Failure, str], dict[str, Any]]
"""Body of an error answer, from the failure and the request's id."""


def plain(failure: Failure, request_id: str) -> dict[str, Any]:
    """Return the body of GenServe's own routes."""
    return {"error": failure.kind, "message": failure.message, "request_id": request_id}


def openai(failure: Failure, request_id: str) -> dict[str, Any]:
    """Return OpenAI's body."""
    kind = "invalid_request_error" if failure.status < 500 and failure.status != 429 else "server_error"
    return {
        "error": {
            "message": failure.message,
            "type": "rate_limit_error" if failure.status == 429 else kind,
            "param": None,
            "code": failure.kind,
        },
        "request_id": request_id,
    }


def cohere(failure: Failure, request_id: str) -> dict[str, Any]:
    """Return Cohere's body."""
    return {"id": request_id, "message": failure.message}


def tei(failure: Failure, request_id: str) -> dict[str, Any]:
    """Return the body of text-embeddings-inference."""
    kinds = {400: "Validation", 413: "Validation", 422: "Validation", 429: "Overloaded", 503: "Overloaded"}
    return {"error": failure.message, "error_type": kinds.get(failure.status, "Backend"), "request_id": request_id}


def nim(failure: Failure, request_id: str) -> dict[str, Any]:
    """Return the body of NVIDIA's reranking service."""
    return {"object": "error", "message": failure.message, "type": failure.kind, "detail": {"request_id": request_id}}
