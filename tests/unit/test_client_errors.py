"""From the error answers of servers and proxies to the client's exceptions."""

from __future__ import annotations

import pytest

import genserve
from genserve import errors
from genserve.errors import (
    Cancelled,
    DeadlineExceeded,
    GenServeError,
    InvalidInput,
    OutOfMemory,
    QueueFull,
    ServerError,
    ServerUnavailable,
    from_answer,
)
from genserve_backend.errors import RequestError

NAMED = [InvalidInput, QueueFull, DeadlineExceeded, Cancelled, OutOfMemory, ServerError]
STATUSES = ["StatusCode.INTERNAL", "StatusCode.UNAVAILABLE", "400", "500", "503", None]


@pytest.mark.parametrize("status", STATUSES, ids=str)
@pytest.mark.parametrize("kind", NAMED, ids=lambda kind: kind.__name__)
def test_a_name_of_ours_decides_whatever_the_code(kind: type[GenServeError], status: str | None) -> None:
    error = from_answer(status, f"{kind.__name__}: STEPS is 0\nallowed: 1 to 100")
    assert type(error) is kind
    assert str(error) == "STEPS is 0\nallowed: 1 to 100"


def test_every_error_that_the_server_sends_has_its_exception() -> None:
    for sent in RequestError.__subclasses__():
        error = from_answer("500", sent("why").wire_message)
        assert (type(error).__name__, str(error)) == (sent.__name__, "why")


@pytest.mark.parametrize("status", ["StatusCode.UNAVAILABLE", "503"])
@pytest.mark.parametrize(
    ("message", "kind"),
    [("Exceeds maximum queue size", QueueFull), ("Request timeout expired", DeadlineExceeded)],
    ids=["queue-full", "queue-timeout"],
)
def test_tritons_own_two_texts(message: str, kind: type[GenServeError], status: str) -> None:
    error = from_answer(status, message)
    assert type(error) is kind
    assert str(error) == message


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("StatusCode.INVALID_ARGUMENT", InvalidInput),
        ("StatusCode.CANCELLED", Cancelled),
        ("StatusCode.DEADLINE_EXCEEDED", DeadlineExceeded),
        ("StatusCode.UNAVAILABLE", ServerUnavailable),
        ("StatusCode.NOT_FOUND", ServerUnavailable),
        ("StatusCode.RESOURCE_EXHAUSTED", InvalidInput),
        ("StatusCode.INTERNAL", ServerError),
        ("StatusCode.UNKNOWN", ServerError),
        ("400", InvalidInput),
        ("404", ServerUnavailable),
        ("413", InvalidInput),
        ("499", Cancelled),
        ("500", ServerError),
        ("503", ServerUnavailable),
        ("504", DeadlineExceeded),
        ("StatusCode.DATA_LOSS", ServerError),
        ("418", ServerError),
        ("", ServerError),
        (None, ServerError),
    ],
    ids=str,
)
def test_without_a_name_the_code_decides(status: str | None, kind: type[GenServeError]) -> None:
    error = from_answer(status, "expected [1,1] for input PROMPT")
    assert type(error) is kind
    assert str(error) == "expected [1,1] for input PROMPT"


@pytest.mark.parametrize(
    "message",
    [
        "",
        "invalidinput: x",
        "InvalidInputs: x",
        "InvalidInput",
        "the request failed: InvalidInput: x",
        "GenServeError: x",
    ],
)
def test_only_a_whole_name_in_front_counts(message: str) -> None:
    assert type(from_answer("500", message)) is ServerError


def test_every_exception_is_exported_and_caught_by_the_base() -> None:
    kinds = [*NAMED, ServerUnavailable]
    assert {kind.__name__ for kind in errors.GenServeError.__subclasses__()} == {kind.__name__ for kind in kinds}
    for kind in kinds:
        assert getattr(genserve, kind.__name__) is kind
        assert issubclass(kind, GenServeError)
