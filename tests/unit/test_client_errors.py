"""Mapping from error answers to client exceptions."""

from __future__ import annotations

import pickle

import pytest

import genserve
from genserve import errors
from genserve.errors import (
    MESSAGE_RULES,
    STATUSES,
    Cancelled,
    DeadlineExceeded,
    GenServeError,
    InvalidInput,
    NotAllowed,
    OutOfMemory,
    QueueFull,
    ServerError,
    ServerUnavailable,
    from_answer,
    located,
)
from genserve_backend.errors import RequestError

NAMED = [InvalidInput, QueueFull, DeadlineExceeded, Cancelled, OutOfMemory, ServerUnavailable, ServerError]
ANY_STATUS = ["StatusCode.INTERNAL", "StatusCode.UNAVAILABLE", "400", "500", "503", None]


@pytest.mark.parametrize("status", ANY_STATUS, ids=str)
@pytest.mark.parametrize("kind", NAMED, ids=lambda kind: kind.__name__)
def test_error_name_decides_for_any_status(kind: type[GenServeError], status: str | None) -> None:
    error = from_answer(status, f"{kind.__name__}: STEPS is 0\nallowed: 1 to 100")
    assert type(error) is kind
    assert str(error) == "STEPS is 0\nallowed: 1 to 100"


def test_every_backend_error_has_a_client_exception() -> None:
    for sent in RequestError.__subclasses__():
        error = from_answer("500", sent("why").wire_message)
        assert (type(error).__name__, str(error)) == (sent.__name__, "why")


EXAMPLES = [
    ("Exceeds maximum queue size", QueueFull),
    ("Request timeout expired", DeadlineExceeded),
    ("Server is stopping, scheduler for model has stopped accepting new inference requests", ServerUnavailable),
    ("Server not ready", ServerUnavailable),
    ("Request for unknown model: 'flux' is not found", ServerUnavailable),
    ("Model version not ready", ServerUnavailable),
    ("Request for unknown model: 'flux' has no available versions", ServerUnavailable),
    ("'flux' has no available versions", ServerUnavailable),
    ("Request for unknown model: 'flux' version 1 is not at ready state", ServerUnavailable),
    ("'flux' version 1 is not at ready state", ServerUnavailable),
    ("This API is restricted, expecting header 'key'", NotAllowed),
    ("This protocol is restricted, expecting header 'triton-grpc-protocol-key'", NotAllowed),
    ("GRPC server is shutting down and has stopped accepting new requests.", ServerUnavailable),
    ("Stub process 'rerank_0_0' is not healthy.", ServerUnavailable),
    ("Stub process is not healthy.", ServerUnavailable),
    ("Stub process is unhealthy and it will be restarted.", ServerUnavailable),
    ("Failed to obtain the health mutex.", ServerUnavailable),
    ("Locally cancelled by application!", Cancelled),
    ("Channel closed!", Cancelled),
    ("Cancelling all calls", ServerUnavailable),
    ("Server shutdown", ServerUnavailable),
    ("Server Shutdown", ServerUnavailable),
    ("Socket closed", ServerUnavailable),
    ("Stream removed", ServerUnavailable),
    ("recvmsg:Connection reset by peer", ServerUnavailable),
    ("failed to connect to all addresses; last error: UNKNOWN: ipv4: Connection refused", ServerUnavailable),
    ("Connection aborted.", ServerUnavailable),
    ("sendmsg: Broken pipe", ServerUnavailable),
    ("Transport closed", ServerUnavailable),
    ("Endpoint closing", ServerUnavailable),
    ("GOAWAY received; Error code: 0; Debug Text: bye", ServerUnavailable),
    ("keepalive watchdog timeout", ServerUnavailable),
    ("Received RST_STREAM with error code 2", ServerUnavailable),
    ("Received RST_STREAM with error code 8", ServerUnavailable),
    ("CLIENT: Received message larger than max (9 vs. 4)", InvalidInput),
    ("Received http2 header with status: 401", NotAllowed),
    ("Received http2 header with status: 403", NotAllowed),
    ("Received http2 header with status: 404", InvalidInput),
    ("Received http2 header with status: 413", InvalidInput),
    ("Received http2 header with status: 429", QueueFull),
    ("Received http2 header with status: 500", ServerError),
    ("Received http2 header with status: 502", ServerUnavailable),
    ("Received http2 header with status: 503", ServerUnavailable),
    ("Received http2 header with status: 504", DeadlineExceeded),
]


@pytest.mark.parametrize("status", ["StatusCode.UNAVAILABLE", "StatusCode.INTERNAL", "StatusCode.CANCELLED", "500"])
@pytest.mark.parametrize(("message", "kind"), EXAMPLES, ids=[message for message, _ in EXAMPLES])
def test_fixed_message_decides_for_any_status(message: str, kind: type[GenServeError], status: str) -> None:
    error = from_answer(status, message)
    assert type(error) is kind
    assert str(error) == message


@pytest.mark.parametrize("rule", MESSAGE_RULES, ids=lambda rule: rule.pattern)
def test_every_message_rule_is_needed(rule: errors.MessageRule, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule whose removal changes nothing is redundant, or comes too late."""
    messages = [message for message, _ in EXAMPLES] + ["", "CANCELLED"]
    statuses = ["StatusCode.CANCELLED", "StatusCode.INTERNAL"]

    def kinds() -> list[type[GenServeError]]:
        return [type(from_answer(status, message)) for message in messages for status in statuses]

    before = kinds()
    monkeypatch.setattr(errors, "MESSAGE_RULES", tuple(each for each in MESSAGE_RULES if each != rule))
    assert kinds() != before


@pytest.mark.parametrize("message", ["", "CANCELLED"], ids=["no-text", "code-only"])
def test_cancellation_without_message_means_server_shutdown(message: str) -> None:
    assert type(from_answer("StatusCode.CANCELLED", message)) is ServerUnavailable
    assert type(from_answer("StatusCode.INTERNAL", message)) is ServerError


def test_reset_caused_by_this_client_is_not_server_unavailable() -> None:
    assert type(from_answer("StatusCode.RESOURCE_EXHAUSTED", "Received RST_STREAM with error code 11")) is QueueFull


PREFIXES = [
    "[request id: mine] ",
    "[request id: <id_unknown>] ",
    "in ensemble 'pipeline', ",
    "Failed to process the request(s) for model instance 'rerank_0_0', message: ",
    "Failed to process the request(s) for model 'rerank', message: ",
    "[request id: mine] in ensemble 'pipeline', Failed to process the request(s) for model instance 'a', message: ",
    "in ensemble 'pipeline', [request id: other] ",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    ("message", "kind", "text"),
    [
        ("Stub process 'a' is not healthy.", ServerUnavailable, "Stub process 'a' is not healthy."),
        ("InvalidInput: STEPS is 0", InvalidInput, "STEPS is 0"),
        ("Exceeds maximum queue size", QueueFull, "Exceeds maximum queue size"),
    ],
    ids=["stub", "named", "queue-full"],
)
def test_triton_prefixes_are_stripped(prefix: str, message: str, kind: type[GenServeError], text: str) -> None:
    error = from_answer("500", prefix + message, request_id="mine")
    assert (type(error), str(error)) == (kind, text)


def test_request_id_with_bracket_is_stripped() -> None:
    error = from_answer("500", "[request id: a] b] InvalidInput: x", request_id="a] b")
    assert (type(error), str(error)) == (InvalidInput, "x")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("StatusCode.ABORTED", ServerError),
        ("StatusCode.ALREADY_EXISTS", InvalidInput),
        ("StatusCode.CANCELLED", Cancelled),
        ("StatusCode.DATA_LOSS", ServerError),
        ("StatusCode.DEADLINE_EXCEEDED", DeadlineExceeded),
        ("StatusCode.FAILED_PRECONDITION", InvalidInput),
        ("StatusCode.INTERNAL", ServerError),
        ("StatusCode.INVALID_ARGUMENT", InvalidInput),
        ("StatusCode.NOT_FOUND", InvalidInput),
        ("StatusCode.OUT_OF_RANGE", InvalidInput),
        ("StatusCode.PERMISSION_DENIED", NotAllowed),
        ("StatusCode.RESOURCE_EXHAUSTED", QueueFull),
        ("StatusCode.UNAUTHENTICATED", NotAllowed),
        ("StatusCode.UNAVAILABLE", ServerUnavailable),
        ("StatusCode.UNIMPLEMENTED", ServerError),
        ("StatusCode.UNKNOWN", ServerError),
        ("302", InvalidInput),
        ("400", InvalidInput),
        ("401", NotAllowed),
        ("403", NotAllowed),
        ("404", InvalidInput),
        ("413", InvalidInput),
        ("418", InvalidInput),
        ("429", QueueFull),
        ("499", Cancelled),
        ("500", ServerError),
        ("501", ServerError),
        ("502", ServerUnavailable),
        ("503", ServerUnavailable),
        ("504", DeadlineExceeded),
        ("599", ServerError),
        ("204", ServerError),
        ("", ServerError),
        (None, ServerError),
    ],
    ids=str,
)
def test_status_decides_without_error_name(status: str | None, kind: type[GenServeError]) -> None:
    error = from_answer(status, "expected [1,1] for input PROMPT")
    assert type(error) is kind
    assert str(error) == "expected [1,1] for input PROMPT"


def test_only_queue_full_has_retry_after() -> None:
    full = from_answer("429", "slow down", retry_after=2.0)
    assert isinstance(full, QueueFull)
    assert full.retry_after == 2.0
    assert from_answer("503", "QueueFull: full", retry_after=3.0).__dict__ == {"retry_after": 3.0}
    assert not hasattr(from_answer("503", "down", retry_after=3.0), "retry_after")
    assert QueueFull("full").retry_after is None


@pytest.mark.parametrize(
    "message",
    [
        "invalidinput: x",
        "InvalidInputs: x",
        "InvalidInput",
        "the request failed: InvalidInput: x",
        "GenServeError: x",
        "NotAllowed: x",
    ],
)
def test_only_an_exact_leading_name_counts(message: str) -> None:
    assert type(from_answer("500", message)) is ServerError


def test_every_exception_is_exported_and_a_genserve_error() -> None:
    kinds = [*NAMED, NotAllowed]
    assert {kind.__name__ for kind in errors.GenServeError.__subclasses__()} == {kind.__name__ for kind in kinds}
    assert set(STATUSES.values()) <= set(kinds)
    for kind in kinds:
        assert getattr(genserve, kind.__name__) is kind
        assert issubclass(kind, GenServeError)


@pytest.mark.parametrize("kind", [*NAMED, NotAllowed], ids=lambda kind: kind.__name__)
def test_error_attributes_survive_pickling(kind: type[GenServeError]) -> None:
    error = kind("why")
    assert (error.request_id, error.url, error.model) == ("", "", "")
    with pytest.raises(kind) as caught, located(model="flux", request_id="mine"), located(url="localhost:1"):
        raise error
    assert caught.value is error
    if isinstance(error, QueueFull):
        error.retry_after = 2.5
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), again.__dict__) == ("why", error.__dict__)
    assert (again.request_id, again.url, again.model) == ("mine", "localhost:1", "flux")
