"""Watching a tritonserver: which part of it has died, and which has stopped."""

from __future__ import annotations

import time

from genserve.serve.process import TritonProcess

PROBE_S = 1.0
"""Seconds between two looks for parts that have stopped."""


class Watch:
    """Finds out when a running server has to be replaced.

    A worker that hangs is its supervisor's business. This is about what contains the supervisors: tritonserver, which
    may be stopped or leave its health endpoint unanswered, and its stubs.

    Args:
        process: The server.
        hang_timeout_s: Seconds that a part may be stopped.
    """

    def __init__(self, process: TritonProcess, *, hang_timeout_s: float) -> None:
        self._process = process
        self._hang_timeout_s = hang_timeout_s
        self._probed = time.monotonic()
        self._stopped_since: dict[str, float] = {}

    def cause(self) -> str | None:
        """Name the first part that is gone or hangs; None while all is well."""
        return self._process.what_died() or self.what_hangs()

    def what_hangs(self) -> str | None:
        """Name a part that has been stopped for too long; None where there is none."""
        now = time.monotonic()
        if now - self._probed < PROBE_S:
            return None
        self._probed = now
        # From the first failed probe on: this process may have been stopped itself, and then all looks late.
        self._stopped_since = {part: self._stopped_since.get(part, now) for part in self._process.stopped_parts()}
        hanging = [part for part, since in self._stopped_since.items() if now - since >= self._hang_timeout_s]
        return f"no sign of life from {hanging[0]} for {self._hang_timeout_s:g} s" if hanging else None
