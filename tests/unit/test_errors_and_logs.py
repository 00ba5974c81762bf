"""Errors and log lines with hostile values stay short and on one line."""

from __future__ import annotations

import io
import json
import logging
import pickle
import re
import sys
from collections.abc import Iterator

import pytest

from genserve_backend import logs
from genserve_backend.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidInput,
    OutOfMemory,
    RequestError,
    ServerError,
    shorten,
)

KINDS = [InvalidInput, Cancelled, DeadlineExceeded, OutOfMemory, ServerError]
HOSTILE = {
    "newlines": "a\nb\r\nc",
    "control": "\x00\x1b[31mred\x07\x7f",
    "separators": "a\u2028b\u2029c\x85d",
    "right-to-left": "\u202egnp.exe",
    "surrogate": "\ud800",
    "quotes": 'say "no" = \\ yes',
    "huge": "x" * 1_000_000,
    "huge-control": "\n" * 1_000_000,
    "bytes": b"\xff\n" * 1_000,
    "nested": ["\n" * 100],
    "empty": "",
    "emoji": "\U0001f43c",
    "none": None,
}
LOGFMT = re.compile(r'(?P<key>\w+)=(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<plain>\S*))(?: |$)')
GENSERVE_LOGGERS = ("genserve", "genserve_backend")

hostile = pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_wire_message_starts_with_the_class_name(kind: type[RequestError]) -> None:
    assert kind("what happened").wire_message == f"{kind.__name__}: what happened"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_errors_can_be_pickled(kind: type[RequestError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("what happened")))
    assert (type(copy), str(copy)) == (kind, "what happened")


def test_invalid_input_names_tensor_value_and_range() -> None:
    assert str(InvalidInput.of("STEPS", 0, "1 to 100")) == "STEPS is 0; allowed: 1 to 100"


@hostile
def test_shorten_returns_one_short_printable_line(value: object) -> None:
    short = shorten(value)
    assert short.isprintable()
    assert len(short) <= 80


@hostile
def test_error_with_a_hostile_value_is_short(value: object) -> None:
    message = InvalidInput.of("PROMPT", value, "UTF-8 text").wire_message
    assert message.isprintable()
    assert len(message) <= 130


def test_shorten_keeps_short_printable_text() -> None:
    assert shorten("a red circle \U0001f43c") == "a red circle \U0001f43c"
    assert shorten(1.5) == "1.5"
    assert shorten("x" * 80) == "x" * 80
    assert shorten("x" * 81) == "x" * 77 + "..."
    assert shorten("abcdef", limit=5) == "ab..."


@pytest.fixture
def loggers() -> Iterator[None]:
    """Restore the process-wide logging after the test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in GENSERVE_LOGGERS}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, was in levels.items():
        logging.getLogger(name).setLevel(was)


@pytest.fixture
def lines(loggers: None, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    logs.configure("DEBUG")
    return stderr


def parse(line: str) -> dict[str, str]:
    """Parse a logfmt line; fail unless every character belongs to a pair."""
    matches = list(LOGFMT.finditer(line))
    assert "".join(match[0] for match in matches) == line
    return {
        match["key"]: json.loads(f'"{match["quoted"]}"') if match["quoted"] is not None else match["plain"]
        for match in matches
    }


@hostile
def test_log_line_is_one_line_and_can_be_parsed(value: object, lines: io.StringIO) -> None:
    logs.log(logging.getLogger("genserve_backend.test"), logging.INFO, f"event {value}", task_id=value, seconds=1.23456)
    text = lines.getvalue()
    assert text.endswith("\n")
    assert len(text.splitlines()) == 1
    assert text.isascii()
    fields = parse(text[:-1])
    assert fields["event"] == f"event {value}"
    assert fields.get("task_id") == (None if value is None else str(value))
    assert fields["seconds"] == "1.235"
    assert fields["level"] == "info"
    assert fields["logger"] == "genserve_backend.test"
    assert {"time", "pid"} <= fields.keys()


def test_traceback_is_part_of_the_line(lines: io.StringIO) -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        logging.getLogger("genserve").exception("failed", extra={"fields": {"task_id": "t"}})
    (line,) = lines.getvalue().splitlines()
    fields = parse(line)
    assert (fields["event"], fields["task_id"], fields["level"]) == ("failed", "t", "error")
    assert fields["traceback"].startswith("Traceback")
    assert fields["traceback"].endswith("first\nsecond")


@pytest.mark.parametrize(
    ("variable", "argument", "level"),
    [
        (None, None, logging.INFO),
        ("DEBUG", None, logging.DEBUG),
        ("debug", None, logging.DEBUG),
        ("ERROR", None, logging.ERROR),
        ("ERROR", "DEBUG", logging.DEBUG),
        ("", None, logging.INFO),
        ("loud", None, logging.INFO),
        ("7 \n", None, logging.INFO),
    ],
    ids=["unset", "upper", "lower", "error", "argument", "empty", "nonsense", "number"],
)
def test_level_comes_from_the_environment(
    variable: str | None, argument: str | None, level: int, loggers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GENSERVE_LOG_LEVEL", raising=False)
    if variable is not None:
        monkeypatch.setenv("GENSERVE_LOG_LEVEL", variable)
    logs.configure(argument)
    assert [logging.getLogger(name).level for name in GENSERVE_LOGGERS] == [level, level]
    assert logging.getLogger().level == logging.WARNING
