"""Deadlines and retries: how long a call may take, and the pauses between its attempts."""

from __future__ import annotations

import random
import time
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

from genserve.errors import DeadlineExceeded, GenServeError, InvalidInput, QueueFull, ServerUnavailable

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 2.0
MAX_TIMEOUT_S = 1e8
"""Three years; what is longer does not fit into every socket's timeout."""


class Deadline:
    """The moment by which a call has to be answered.

    Args:
        timeout: Seconds from now.

    Raises:
        InvalidInput: The timeout is not above 0, or not finite.
    """

    def __init__(self, timeout: float) -> None:
        self.at = time.monotonic() + min(checked_timeout(timeout), MAX_TIMEOUT_S)

    def left(self) -> float:
        """Return the seconds that are left.

        Raises:
            DeadlineExceeded: None are.
        """
        left = self.at - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("no server answered in time")
        return left


class Retries:
    """The pauses of one call: exponential backoff with full jitter, until the time for retries is over.

    Args:
        retry_for: Seconds from now during which a request may be sent again.
        deadline: The call's; nothing is sent after it.
    """

    def __init__(self, retry_for: float, deadline: Deadline) -> None:
        self._give_up = min(deadline.at, time.monotonic() + retry_for)
        self._longest = FIRST_PAUSE_S

    def pause_after(self, error: GenServeError) -> float | None:
        """Return the seconds to wait before the next attempt, or None when there is to be none.

        A full queue is asked again only if a gateway said when.
        """
        if isinstance(error, QueueFull) and error.retry_after is not None:
            earliest = error.retry_after
        elif isinstance(error, ServerUnavailable):
            earliest = 0.0
        else:
            return None
        pause = earliest + random.uniform(0, self._longest)  # noqa: S311  # spreads requests, protects nothing
        self._longest = min(2 * self._longest, LONGEST_PAUSE_S)
        return pause if time.monotonic() + pause < self._give_up else None


def checked_timeout(timeout: float) -> float:
    """Return the timeout.

    Raises:
        InvalidInput: It is not above 0, or not finite.
    """
    if not 0 < timeout < float("inf"):
        raise InvalidInput(f"timeout is {timeout}; allowed: seconds, above 0")
    return timeout


def parse_retry_after(value: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for, None where it is missing or not understood.

    Args:
        value: Seconds, or a date as HTTP writes it.
    """
    value = (value or "").strip()
    if value.isascii() and value.isdecimal():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=timezone.utc)
    return max(0.0, (date - datetime.now(timezone.utc)).total_seconds())
