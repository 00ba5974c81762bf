"""Scheduling rules that the engines share: aging of levels, the progress interval and outstanding grants."""

from __future__ import annotations

import time

from genserve_backend.worker.messages import LEVELS

AGING_S = 10.0
"""Seconds of waiting after which a request counts as one level more urgent."""
PROGRESS_S = 0.1
"""Minimum interval between two progress reports, in seconds."""


def effective_level(level: int, waited_s: float) -> int:
    """Return the priority level after aging: one level more urgent for every `AGING_S` seconds of waiting."""
    return max(LEVELS[0], level - int(waited_s / AGING_S))


class ProgressTimer:
    """Rate limit of progress reports.

    Args:
        last: Time of the last report, on the clock of time.monotonic(). By default the first report is due at once.
    """

    def __init__(self, last: float = 0.0) -> None:
        self._last = last

    def is_due(self) -> bool:
        """Return whether `PROGRESS_S` have passed since the last report. If so, restart the interval."""
        now = time.monotonic()
        if now - self._last < PROGRESS_S:
            return False
        self._last = now
        return True


class GrantCounter:
    """Count of the requests that were granted and have not arrived yet."""

    def __init__(self) -> None:
        self._count = 0  # below zero after a restart, when requests arrive without a grant

    def granted(self, count: int) -> None:
        """Record that `count` requests were granted."""
        self._count += count

    def arrived(self) -> None:
        """Record that a request has arrived."""
        self._count -= 1

    @property
    def outstanding(self) -> int:
        """Requests still to come."""
        return max(0, self._count)
