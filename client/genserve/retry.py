"""Deadlines, retries and backoff."""

from __future__ import annotations

import random
import time
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from numbers import Real

from genserve.errors import DeadlineExceeded, GenServeError, InvalidInput, QueueFull, ServerUnavailable

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 2.0
MAX_TIMEOUT_S = 1e8
"""Three years: the longest timeout that every socket accepts."""


class Deadline:
    """Deadline of a call.

    Args:
        timeout: Seconds from now.

    Raises:
        InvalidInput: The timeout is not above 0, or not finite.
    """

    def __init__(self, timeout: float) -> None:
        self.at = time.monotonic() + min(checked_timeout(timeout), MAX_TIMEOUT_S)

    def left(self) -> float:
        """Return the remaining seconds.

        Raises:
            DeadlineExceeded: The deadline has passed.
        """
        left = self.at - time.monotonic()
        if left <= 0:
            error = DeadlineExceeded("no server answered in time")
            error.sent = False
            raise error
        return left


class Retries:
    """Pauses between the attempts of one call: exponential backoff with full jitter.

    Args:
        retry_for: Seconds from now in which retries may start.
        deadline: The call's deadline; no attempt starts after it.
    """

    def __init__(self, retry_for: float, deadline: Deadline) -> None:
        self._give_up = min(deadline.at, time.monotonic() + retry_for)
        self._longest = FIRST_PAUSE_S

    def pause_after(self, error: GenServeError) -> float | None:
        """Return the seconds to wait before the next attempt, or None to give up.

        A full queue is retried only if a gateway gave `retry_after`.
        """
        if isinstance(error, QueueFull) and error.retry_after is not None:
            earliest = error.retry_after
        elif isinstance(error, ServerUnavailable):
            earliest = 0.0
        else:
            return None
        pause = earliest + random.uniform(0, self._longest)  # noqa: S311  # not security-relevant
        self._longest = min(2 * self._longest, LONGEST_PAUSE_S)
        return pause if time.monotonic() + pause < self._give_up else None


def checked_timeout(timeout: float) -> float:
    """Return the timeout if it is valid.

    Raises:
        InvalidInput: The timeout is not above 0, or not finite.
    """
    if not isinstance(timeout, Real) or not 0 < timeout < float("inf"):
        raise InvalidInput(f"timeout is {timeout!r:.80}; allowed: seconds, above 0")
    return timeout


def parse_retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, or None if it is missing or malformed.

    Args:
        value: Seconds, or an HTTP date.
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
