"""Number of requests in flight of a bulk call: given, or found while it runs."""

from __future__ import annotations

import time

FIRST_PER_SERVER = 2
"""Requests in flight at the start: one that runs, and one that waits so that the server never does."""
MOST_PER_SERVER = 64
"""Enough for full batches of rerankers; more only wait."""
GROWTH = 1.5
GAIN = 1.05
"""Ratio of throughputs that makes a higher number worth it."""
USED = 0.75
"""Least mean share of the limit in flight that makes a window count."""
WINDOWS_HELD = 20
"""Windows after which a number that was found is questioned again."""
REFUSED_PAUSE_S = 0.5
"""Seconds without further requests after a full queue."""


class Concurrency:
    """Limit on the requests in flight.

    It grows by half as long as that raises the throughput, and returns to the best number otherwise. A full queue
    lowers it to the requests that the servers hold. Throughput counts over windows of two rounds of requests.

    Args:
        fixed: Limit given by the caller; None finds one.
        servers: Number of servers.
    """

    def __init__(self, fixed: int | None, servers: int) -> None:
        self.limit = fixed or FIRST_PER_SERVER * servers
        self._is_fixed = fixed is not None
        self._most = fixed or MOST_PER_SERVER * servers
        self._before: tuple[int, float] | None = None
        """The last lower limit, and its throughput."""
        self._held = 0
        self._paused_until = 0.0
        self._open_window()

    def room(self, in_flight: int) -> int:
        """Return the number of requests that may start now."""
        if in_flight and time.monotonic() < self._paused_until:
            return 0
        return max(0, self.limit - in_flight)

    def refused(self, in_flight: int) -> None:
        """Lower the limit after a full queue to the requests still in flight."""
        self._paused_until = time.monotonic() + REFUSED_PAUSE_S
        if not self._is_fixed:
            self.limit = max(1, min(self.limit, in_flight))
            self._before, self._held = None, WINDOWS_HELD
        self._open_window()

    def completed(self, in_flight: int) -> None:
        """Count a finished request; at the end of a window, choose the next limit.

        Args:
            in_flight: Number of requests in flight, with the finished one.
        """
        self._completed += 1
        self._in_flight += in_flight
        if self._is_fixed or self._completed < 2 * self.limit:
            return
        throughput = self._completed / max(time.monotonic() - self._opened, 1e-9)
        # With too few requests, the throughput says nothing about the limit.
        if self._in_flight >= USED * self.limit * self._completed:
            self._choose(throughput)
        self._open_window()

    def _choose(self, throughput: float) -> None:
        if self._held:
            self._held -= 1
        elif self._before and throughput < GAIN * self._before[1]:
            self.limit, self._before, self._held = self._before[0], None, WINDOWS_HELD
        elif self.limit < self._most:
            self._before = self.limit, throughput
            self.limit = min(self._most, max(self.limit + 1, round(GROWTH * self.limit)))

    def _open_window(self) -> None:
        self._opened, self._completed, self._in_flight = time.monotonic(), 0, 0
