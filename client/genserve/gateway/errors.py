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
UNKNOWN_MODEL = "UnknownModel"
"""Kind of the failure of a request that names a model which is not served."""


@dataclass(eq=False)  # not frozen: contextlib sets __traceback__ of what passes it
class Failure(Exception):
    """Failed request, ready for the shape of any dialect.

    Attributes:
        status: HTTP status.
        kind: Name of the error, as ``InvalidInput``.
        message: One sentence for the caller.
        headers: Further headers of the answer, as Retry-After.
        parameter: The field of the request that is at fault, if it is one.
    """

    status: int
    kind: str
    message: str
    headers: Mapping[str, str] = field(default_factory=dict)
    parameter: str | None = None

    @classmethod
    def of(cls, error: GenServeError, *, retry_after_s: float) -> Failure:
        """Return the failure for an exception of the client."""
        status = next((status for kind, status in STATUSES if isinstance(error, kind)), 500)
        headers = {}
        if isinstance(error, RETRYABLE):
            told = getattr(error, "retry_after", None)
            headers["Retry-After"] = str(math.ceil(retry_after_s if told is None else told))
        elif status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            headers["x-should-retry"] = "false"  # OpenAI's package sends a failed request up to twice more otherwise
        return cls(status, type(error).__name__, str(error), headers)


Shape = Callable[[Failure, str], dict[str, Any]]
"""Body of an error answer, from the failure and the request's id."""


def plain(failure: Failure, request_id: str) -> dict[str, Any]:
    """Return the body of GenServe's own routes."""
    return {"error": failure.kind, "message": failure.message, "request_id": request_id}


def openai(failure: Failure, request_id: str) -> dict[str, Any]:
    """Return OpenAI's body."""
    return {
        "error": {
            "message": failure.message,
            "type": _openai_type(failure.status),
            "param": failure.parameter,
            "code": "model_not_found" if failure.kind == UNKNOWN_MODEL else failure.kind,
        },
        "request_id": request_id,
    }


def cohere(failure: Failure, request_id: str) -> dict[str, Any]:
    """Return Cohere's body, with the field that Jina's clients read."""
    return {"id": request_id, "message": failure.message, "detail": failure.message}


def tei(failure: Failure, request_id: str) -> dict[str, Any]:
    """Return the body of text-embeddings-inference, with the field that Jina's clients read."""
    kinds = {429: "Overloaded", 503: "Overloaded"}
    kind = kinds.get(failure.status, "Validation" if failure.status < 500 else "Backend")
    return {"error": failure.message, "error_type": kind, "detail": failure.message, "request_id": request_id}


def vllm(failure: Failure, request_id: str) -> dict[str, Any]:
    """Return vLLM's body: OpenAI's, with the status as a number."""
    kinds = {400: "BadRequestError", 404: "NotFoundError"}
    kind = kinds.get(failure.status) or _phrase(failure.status)
    error = {"message": failure.message, "type": kind, "param": failure.parameter, "code": failure.status}
    return {"error": error, "request_id": request_id}


def nim(failure: Failure, request_id: str) -> dict[str, Any]:
    """Return the body of NVIDIA's reranking service."""
    return {
        "object": "error",
        "message": failure.message,
        "type": _openai_type(failure.status),
        "detail": {"request_id": request_id},
    }


def _openai_type(status: int) -> str:
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    return "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:  # as 499
        return "Error"
