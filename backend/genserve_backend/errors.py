"""Errors of a single request.

Each class is one entry of the error table. Its name is the first word of the message that leaves the server
(``InvalidInput: STEPS is 0; allowed: 1 to 100``), and the client raises the class of the same name. `adapter.reply`
maps the classes to Triton's codes.
"""

from __future__ import annotations


class RequestError(Exception):
    """One request failed; no other request is affected."""

    @property
    def wire_message(self) -> str:
        """The message with the class name in front, which the client parses."""
        return f"{type(self).__name__}: {self}"


class InvalidInput(RequestError):
    """A tensor has a value that the contract does not allow."""

    @classmethod
    def of(cls, tensor: str, value: object, allowed: str) -> InvalidInput:
        """Return the error that names the tensor, a short form of its value, and what is allowed."""
        return cls(f"{tensor} is {shorten(value)}; allowed: {allowed}")


class Cancelled(RequestError):
    """The caller cancelled the request."""


class DeadlineExceeded(RequestError):
    """The request did not finish within its timeout, or could not."""


class OutOfMemory(RequestError):
    """The request does not fit into the device's memory, not even alone."""


class ServerUnavailable(RequestError):
    """A process of the server ended while it had the request; a retry helps."""


class ServerError(RequestError):
    """A defect in the server, or a request that was in flight at two worker deaths."""


def shorten(value: object, limit: int = 80) -> str:
    """Return a printable one-line form of any client-supplied value, at most `limit` characters long."""
    text = value if isinstance(value, str) else repr(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
