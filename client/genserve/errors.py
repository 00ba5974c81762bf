"""The exceptions that a caller sees: one for each row of the contract's error table."""

from __future__ import annotations

import re


class GenServeError(Exception):
    """Anything that went wrong between asking and getting an answer."""


class InvalidInput(GenServeError):
    """The server does not accept a value; the message names the tensor, the value and the allowed range."""


class QueueFull(GenServeError):
    """The server holds as many waiting requests as it may; try again later, or elsewhere."""


class DeadlineExceeded(GenServeError):
    """The request waited or ran past its timeout."""


class Cancelled(GenServeError):
    """The request was cancelled."""


class OutOfMemory(GenServeError):
    """The request does not fit into the device's memory, not even alone."""


class ServerUnavailable(GenServeError):
    """No server could be reached, or the one that was went away before it answered."""


class ServerError(GenServeError):
    """A defect in the server, or a request that was in flight at two worker crashes."""


NAMED = {
    error.__name__: error for error in (InvalidInput, QueueFull, DeadlineExceeded, Cancelled, OutOfMemory, ServerError)
}
"""GenServe's own models begin their messages with one of these names and a colon."""
_NAME = re.compile(rf"({'|'.join(NAMED)}): (.*)", re.DOTALL)

TRITON_MESSAGES = (
    # Triton answers both with one code, so their texts, which are fixed in its scheduler, are what tells them apart.
    ("Exceeds maximum queue size", QueueFull),
    ("Request timeout expired", DeadlineExceeded),
)

CODES: dict[str, type[GenServeError]] = {
    # gRPC
    "StatusCode.INVALID_ARGUMENT": InvalidInput,
    "StatusCode.CANCELLED": Cancelled,
    "StatusCode.DEADLINE_EXCEEDED": DeadlineExceeded,
    "StatusCode.UNAVAILABLE": ServerUnavailable,
    "StatusCode.NOT_FOUND": ServerUnavailable,
    "StatusCode.RESOURCE_EXHAUSTED": InvalidInput,  # a message beyond the size limit
    "StatusCode.INTERNAL": ServerError,
    "StatusCode.UNKNOWN": ServerError,
    # HTTP
    "400": InvalidInput,
    "404": ServerUnavailable,  # no such model is loaded
    "413": InvalidInput,
    "499": Cancelled,
    "500": ServerError,
    "503": ServerUnavailable,
    "504": DeadlineExceeded,
}
"""What the code alone says, for messages that begin with no name of ours: Triton's own, or a proxy's."""


def from_answer(status: str | None, message: str, *, request_id: str = "") -> GenServeError:
    """The exception for an error answer.

    Args:
        status: As tritonclient gives it: ``StatusCode.X`` over gRPC, the number over HTTP, None if there was none.
        message: The text of the answer.
        request_id: The request's; Triton puts it in front of its own messages.
    """
    message = message.removeprefix(f"[request id: {request_id}] ")
    named = _NAME.match(message)
    if named:
        return NAMED[named[1]](named[2])
    for start, error in TRITON_MESSAGES:
        if message.startswith(start):
            return error(message)
    return CODES.get(status or "", ServerError)(message)
