"""Client exceptions, and the mapping from error answers to them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import NamedTuple


class GenServeError(Exception):
    """Base class of every failure of a call.

    Attributes:
        request_id: The request's id in the server's log; empty if no request was built.
        url: The address of the server that returned the error; empty if none was called.
        model: The model that was called; empty if there was none.
    """

    request_id: str = ""
    url: str = ""
    model: str = ""


class InvalidInput(GenServeError):
    """Rejected value. The message names the tensor, the value and the allowed range."""


class QueueFull(GenServeError):
    """Full queue of a server, or rate limit of a gateway.

    Attributes:
        retry_after: Seconds after which a gateway accepts a retry; None if it did not say.
    """

    def __init__(self, *args: object, retry_after: float | None = None) -> None:
        super().__init__(*args)
        self.retry_after = retry_after


class DeadlineExceeded(GenServeError):
    """Request that waited or ran past its timeout, or could not be finished within it.

    Attributes:
        sent: False if no time was left to send the request.
    """

    sent: bool = True


class Cancelled(GenServeError):
    """Cancelled request."""


class OutOfMemory(GenServeError):
    """Request that does not fit into device memory, even alone."""


class ServerUnavailable(GenServeError):
    """Unreachable server, or one that went away before it answered."""


class NotAllowed(GenServeError):
    """Request with a missing or wrong key, as rejected by a gateway."""


class ServerError(GenServeError):
    """Defect in the server, or a request that was in flight at two worker crashes."""


NAMED: dict[str, type[GenServeError]] = {
    error.__name__: error
    for error in (InvalidInput, QueueFull, DeadlineExceeded, Cancelled, OutOfMemory, ServerUnavailable, ServerError)
}
"""Exceptions by the name with which GenServe's models begin a message, as in ``InvalidInput: ...``."""


class MessageRule(NamedTuple):
    """Mapping from a message text to an exception.

    Attributes:
        pattern: Regular expression to search for in the message.
        kind: The exception class.
        status: The only status for which the rule holds; empty for any status.
    """

    pattern: str
    kind: type[GenServeError]
    status: str = ""


MESSAGE_RULES = (
    # Triton's core. Both queue rejections have the same code; only their texts differ.
    MessageRule(r"^Exceeds maximum queue size", QueueFull),
    MessageRule(r"^Request timeout expired", DeadlineExceeded),
    MessageRule(r"^Server is stopping", ServerUnavailable),
    MessageRule(r"^Server not ready", ServerUnavailable),
    MessageRule(r"^Request for unknown model", ServerUnavailable),
    MessageRule(r"^Model version not ready", ServerUnavailable),
    MessageRule(r" has no available versions$", ServerUnavailable),
    MessageRule(r" is not at ready state$", ServerUnavailable),
    MessageRule(r"^This (API|protocol) is restricted, expecting header ", NotAllowed),
    MessageRule(r"server is shutting down and has stopped accepting", ServerUnavailable),
    # Triton's Python backend: a stub has died.
    MessageRule(r"^Stub process ('.*' )?is (not healthy|unhealthy)", ServerUnavailable),
    MessageRule(r"^Failed to obtain the health mutex", ServerUnavailable),
    # gRPC. Cancellation by the caller and shutdown of the server have the same code.
    MessageRule(r"^Locally cancelled by application", Cancelled),
    MessageRule(r"^Channel closed", Cancelled),
    MessageRule(r"^$", ServerUnavailable, "StatusCode.CANCELLED"),
    MessageRule(r"^CANCELLED$", ServerUnavailable, "StatusCode.CANCELLED"),
    MessageRule(r"Cancelling all calls", ServerUnavailable),
    MessageRule(r"[Ss]erver [Ss]hutdown", ServerUnavailable),
    MessageRule(r"Socket closed", ServerUnavailable),
    MessageRule(r"Stream removed", ServerUnavailable),
    MessageRule(r"Connection (aborted|cancelled|refused|reset)", ServerUnavailable),
    MessageRule(r"Broken pipe", ServerUnavailable),
    MessageRule(r"[Tt]ransport closed", ServerUnavailable),
    MessageRule(r"Endpoint clos", ServerUnavailable),
    MessageRule(r"GOAWAY received", ServerUnavailable),
    MessageRule(r"keepalive watchdog timeout", ServerUnavailable),
    # NO_ERROR to CANCEL. Higher codes are about this client's own behaviour.
    MessageRule(r"Received RST_STREAM with error code [0-8]\b", ServerUnavailable),
    MessageRule(r"message larger than max", InvalidInput),
)
"""Fixed message texts. The first matching rule decides."""

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
"""Exceptions by status. Other HTTP statuses from 300 to 499 are InvalidInput, the rest ServerError."""

_NAME = re.compile(rf"({'|'.join(NAMED)}): (.*)", re.DOTALL)
_PREFIXES = re.compile(
    r"(\[request id: .*?\] |in ensemble '[^']*', |Failed to process the request\(s\) for model (instance )?'[^']*',"
    r" message: )+"
)
"""Prefixes that Triton adds to a message."""
_HTTP_STATUS = re.compile(r"http2 header with status: (\d{3})")
"""gRPC's message for a plain HTTP answer of a proxy."""


def from_answer(
    status: str | None, message: str, *, request_id: str = "", retry_after: float | None = None
) -> GenServeError:
    """Return the exception for an error answer.

    Args:
        status: ``StatusCode.X`` over gRPC, the number over HTTP, None without a status.
        message: The answer's message.
        request_id: The request's id, which Triton prefixes to its own messages.
        retry_after: Seconds after which the server accepts a retry.
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
    for rule in MESSAGE_RULES:
        if rule.status in {"", status} and re.search(rule.pattern, message):
            return rule.kind
    http = _HTTP_STATUS.search(message)
    if http:
        status = http[1]
    if status in STATUSES:
        return STATUSES[status]
    # Redirects, 300 to 399, are not followed: the address is wrong.
    return InvalidInput if status.isdecimal() and 300 <= int(status) < 500 else ServerError


@contextlib.contextmanager
def located(**attributes: str) -> Iterator[None]:
    """Set attributes such as `url` and `model` on every GenServeError that passes through."""
    try:
        yield
    except GenServeError as error:
        for name, value in attributes.items():
            setattr(error, name, value)
        raise
