"""The exceptions that a caller sees, and the one table that turns error answers into them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import NamedTuple


class GenServeError(Exception):
    """Any failure between a call and its answer.

    Attributes:
        request_id: The request's id in the server's log; empty where there was no request.
        url: The address of the server that gave the error; empty where no server was asked.
        model: The model that was asked; empty where there was none.
    """

    request_id: str = ""
    url: str = ""
    model: str = ""


class InvalidInput(GenServeError):
    """A value that the server does not accept; the message names the tensor, the value and the allowed range."""


class QueueFull(GenServeError):
    """A server that holds as many waiting requests as it may, or a gateway that limits the rate.

    Attributes:
        retry_after: Seconds after which a gateway wants the request again, or None where it did not say.
    """

    def __init__(self, *args: object, retry_after: float | None = None) -> None:
        super().__init__(*args)
        self.retry_after = retry_after


class DeadlineExceeded(GenServeError):
    """A request that waited or ran past its timeout."""


class Cancelled(GenServeError):
    """A request that was cancelled."""


class OutOfMemory(GenServeError):
    """A request that does not fit into the device's memory, not even alone."""


class ServerUnavailable(GenServeError):
    """No server that could be reached, or one that went away before it answered."""


class NotAllowed(GenServeError):
    """A request that a gateway refuses because its key is missing or wrong."""


class ServerError(GenServeError):
    """A defect in the server, or a request that was in flight at two worker crashes."""


NAMED: dict[str, type[GenServeError]] = {
    error.__name__: error
    for error in (InvalidInput, QueueFull, DeadlineExceeded, Cancelled, OutOfMemory, ServerUnavailable, ServerError)
}
"""GenServe's own models begin their messages with one of these names and a colon."""


class Text(NamedTuple):
    """One row of the table of message texts.

    Attributes:
        pattern: Regular expression, searched for in the message.
        kind: The exception that it means.
        status: The only status with which the row holds; empty for any.
    """

    pattern: str
    kind: type[GenServeError]
    status: str = ""


TEXTS = (
    # Triton's core. The queue's two refusals have one code, so only their texts tell them apart.
    Text(r"^Exceeds maximum queue size", QueueFull),
    Text(r"^Request timeout expired", DeadlineExceeded),
    Text(r"^Server is stopping", ServerUnavailable),
    Text(r"^Server not ready", ServerUnavailable),
    Text(r"^Request for unknown model", ServerUnavailable),
    Text(r"^Model version not ready", ServerUnavailable),
    Text(r" has no available versions$", ServerUnavailable),
    Text(r" is not at ready state$", ServerUnavailable),
    Text(r"^This (API|protocol) is restricted, expecting header ", NotAllowed),
    Text(r"server is shutting down and has stopped accepting", ServerUnavailable),
    # Triton's Python backend, about a stub that has died.
    Text(r"^Stub process ('.*' )?is (not healthy|unhealthy)", ServerUnavailable),
    Text(r"^Failed to obtain the health mutex", ServerUnavailable),
    # gRPC. A caller's own cancellation and a server's end have one code.
    Text(r"^Locally cancelled by application", Cancelled),
    Text(r"^Channel closed", Cancelled),
    Text(r"^$", ServerUnavailable, "StatusCode.CANCELLED"),
    Text(r"^CANCELLED$", ServerUnavailable, "StatusCode.CANCELLED"),
    Text(r"Cancelling all calls", ServerUnavailable),
    Text(r"[Ss]erver [Ss]hutdown", ServerUnavailable),
    Text(r"Socket closed", ServerUnavailable),
    Text(r"Stream removed", ServerUnavailable),
    Text(r"Connection (aborted|cancelled|refused|reset)", ServerUnavailable),
    Text(r"Broken pipe", ServerUnavailable),
    Text(r"[Tt]ransport closed", ServerUnavailable),
    Text(r"Endpoint clos", ServerUnavailable),
    Text(r"GOAWAY received", ServerUnavailable),
    Text(r"keepalive watchdog timeout", ServerUnavailable),
    # From NO_ERROR to CANCEL; the codes after those speak of this client's own behaviour.
    Text(r"Received RST_STREAM with error code [0-8]\b", ServerUnavailable),
    Text(r"message larger than max", InvalidInput),
)
"""Fixed texts and what they mean, whatever the status; the first row that holds decides."""

STATUSES: dict[str, type[GenServeError]] = {
    # gRPC
    "StatusCode.ALREADY_EXISTS": InvalidInput,
    "StatusCode.CANCELLED": Cancelled,
    "StatusCode.DEADLINE_EXCEEDED": DeadlineExceeded,
    "StatusCode.FAILED_PRECONDITION": InvalidInput,
    "StatusCode.INVALID_ARGUMENT": InvalidInput,
    "StatusCode.NOT_FOUND": InvalidInput,
    "StatusCode.OUT_OF_RANGE": InvalidInput,
    "StatusCode.PERMISSION_DENIED": NotAllowed,
    "StatusCode.RESOURCE_EXHAUSTED": QueueFull,
    "StatusCode.UNAUTHENTICATED": NotAllowed,
    "StatusCode.UNAVAILABLE": ServerUnavailable,
    # HTTP
    "401": NotAllowed,
    "403": NotAllowed,
    "429": QueueFull,
    "499": Cancelled,
    "502": ServerUnavailable,
    "503": ServerUnavailable,
    "504": DeadlineExceeded,
}
"""The meaning of a status alone. Every other one of HTTP below 500 is InvalidInput, the rest ServerError."""

_NAME = re.compile(rf"({'|'.join(NAMED)}): (.*)", re.DOTALL)
_PREFIXES = re.compile(
    r"(\[request id: .*?\] |in ensemble '[^']*', |Failed to process the request\(s\) for model (instance )?'[^']*',"
    r" message: )+"
)
"""Triton's additions in front of a message."""
_HTTP_STATUS = re.compile(r"http2 header with status: (\d{3})")
"""The way gRPC words the answer of a proxy that speaks plain HTTP."""


def from_answer(
    status: str | None, message: str, *, request_id: str = "", retry_after: float | None = None
) -> GenServeError:
    """Return the exception for an error answer.

    Args:
        status: ``StatusCode.X`` over gRPC, the number over HTTP, None if there was none.
        message: The text of the answer.
        request_id: The request's; Triton puts it in front of its own messages.
        retry_after: Seconds after which the server wants the request again.
    """
    message = message.removeprefix(f"[request id: {request_id}] ")
    prefixes = _PREFIXES.match(message)
    if prefixes:
        message = message[prefixes.end() :]
    named = _NAME.match(message)
    if named:
        kind, message = NAMED[named[1]], named[2]
    else:
        kind = _kind(status or "", message)
    return QueueFull(message, retry_after=retry_after) if kind is QueueFull else kind(message)


def _kind(status: str, message: str) -> type[GenServeError]:
    for row in TEXTS:
        if row.status in {"", status} and re.search(row.pattern, message):
            return row.kind
    http = _HTTP_STATUS.search(message)
    if http:
        status = http[1]
    if status in STATUSES:
        return STATUSES[status]
    # Below 400 are redirects, which are not followed: the address is not the server's.
    return InvalidInput if status.isdecimal() and 300 <= int(status) < 500 else ServerError


@contextlib.contextmanager
def located(**attributes: str) -> Iterator[None]:
    """Set attributes of every GenServeError that passes: the request's id, the server's url, the model."""
    try:
        yield
    except GenServeError as error:
        for name, value in attributes.items():
            setattr(error, name, value)
        raise
