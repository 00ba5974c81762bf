"""One hostile connection, and the judgement of its outcome."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

TIMEOUT_S = 120.0
"""Seconds after which a connection counts as hanging. A valid image of a generated request takes some."""
CONNECT_TIMEOUT_S = 30.0
MOST_BYTES = 2**26
"""Limit of an answer."""
SHOWN = 300
"""Characters of a request or an answer in a report."""
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
UVICORN = b"Invalid HTTP request received."
"""Answer to bytes that are not HTTP; only it has no request id."""


@dataclass(frozen=True)
class Attack:
    """Bytes to send on a connection of its own.

    Attributes:
        name: Kind of attack, for the report.
        parts: The bytes, sent one after another.
        pause_s: Seconds between two parts.
        may_be_silent: The bytes are no complete request, so the connection may end without an answer.
        closes: The sender closes its side after the last part.
    """

    name: str
    parts: tuple[bytes, ...]
    pause_s: float = 0.0
    may_be_silent: bool = False
    closes: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {b''.join(self.parts)[:SHOWN]!r}"


@dataclass(frozen=True)
class Outcome:
    """End of an attack.

    Attributes:
        status: HTTP status of the first answer; None without one.
        answer: The answer's bytes.
        seconds: Time until the connection's end.
        hung: The connection had to be given up.
    """

    status: int | None
    answer: bytes
    seconds: float
    hung: bool


@dataclass
class Verdict:
    """Count of the outcomes of many attacks.

    Attributes:
        statuses: Number of outcomes by status; 0 stands for no answer.
        names: Number of attacks by kind.
        broken: One line for every outcome that must not be.
        longest_s: Longest time of an attack.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    names: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    longest_s: float = 0.0

    def add(self, attack: Attack, outcome: Outcome) -> None:
        """Count an outcome."""
        self.statuses[outcome.status or 0] += 1
        self.names[attack.name] += 1
        self.longest_s = max(self.longest_s, outcome.seconds)
        if reason := defect(attack, outcome):
            self.broken.append(f"{reason}: {attack}; answer {outcome.answer[:SHOWN]!r}")


def defect(attack: Attack, outcome: Outcome) -> str:
    """Return the reason for which an outcome must not be, empty if it is all right."""
    head = outcome.answer.partition(b"\r\n\r\n")[0].lower()
    if outcome.hung:
        return "no end"
    if outcome.status is None:
        return "" if attack.may_be_silent else "no answer"
    if outcome.status >= 500 and outcome.status != 503:
        return f"status {outcome.status}"
    if (
        outcome.status in {429, 503}
        and b"\r\nretry-after:" not in head
        and b'"status":"unhealthy"' not in outcome.answer
    ):
        return f"status {outcome.status} without Retry-After"
    if b"\r\nx-request-id:" not in head and UVICORN not in outcome.answer:
        return "no request id"
    return ""


def send(attack: Attack, address: tuple[str, int], *, timeout_s: float = TIMEOUT_S) -> Outcome:
    """Send an attack and read until the connection ends."""
    started = time.monotonic()
    received = b""
    hung = False
    with socket.create_connection(address, CONNECT_TIMEOUT_S) as connection:
        connection.settimeout(timeout_s)
        try:
            for number, part in enumerate(attack.parts):
                if number:
                    time.sleep(attack.pause_s)
                connection.sendall(part)
            if attack.closes:
                connection.shutdown(socket.SHUT_WR)
        except TimeoutError:
            hung = True
        except OSError:
            pass  # The gateway has answered and closed before everything was sent.
        try:
            while not hung and len(received) < MOST_BYTES and (data := connection.recv(2**16)):
                received += data
                hung = time.monotonic() - started > timeout_s
        except TimeoutError:
            hung = True
        except OSError:
            pass
    received = received.removeprefix(CONTINUE)
    return Outcome(_status(received), received, time.monotonic() - started, hung)


def send_all(attacks: Iterable[Attack], address: tuple[str, int], *, connections: int) -> Verdict:
    """Send attacks, several at once, and return the verdict."""
    verdict = Verdict()

    def attempt(attack: Attack) -> tuple[Attack, Outcome]:
        return attack, send(attack, address)

    with ThreadPoolExecutor(connections) as pool:
        for attack, outcome in pool.map(attempt, attacks):
            verdict.add(attack, outcome)
    return verdict


def request(
    method: bytes, path: bytes, body: bytes = b"", *, headers: Sequence[tuple[bytes, bytes]] = (), keep: bool = False
) -> bytes:
    """Return the bytes of a request, which ends its connection unless `keep`."""
    lines = [
        b"%s %s HTTP/1.1" % (method, path),
        b"Host: gateway",
        *([] if keep else [b"Connection: close"]),
        *(b"%s: %s" % header for header in headers),
        *([b"Content-Length: %d" % len(body)] if body else []),
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def _status(answer: bytes) -> int | None:
    words = answer.split(b" ", 2)
    if len(words) < 3 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        return None
    return int(words[1])
