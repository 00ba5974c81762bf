"""Failure detection for a running tritonserver and its stubs."""

from __future__ import annotations

import time

from genserve.serve.process import TritonProcess

PROBE_S = 1.0
"""Seconds between two probes for stopped parts."""


class Watch:
    """Detector of failures that require a restart of the server.

    Supervisors replace hanging workers. This class covers the processes that contain the supervisors: tritonserver,
    which may be stopped or leave its health endpoint unanswered, and its stubs.

    Args:
        process: The server.
        hang_timeout_s: Seconds after which a stopped part counts as hanging.
    """

    def __init__(self, process: TritonProcess, *, hang_timeout_s: float) -> None:
        self._process = process
        self._hang_timeout_s = hang_timeout_s
        self._probed = time.monotonic()
        self._stopped_since: dict[str, float] = {}

    def failure(self) -> str | None:
        """Return the cause of a failure: a dead or hanging part, None if there is none."""
        return self._process.dead_part() or self.hang()

    def hang(self) -> str | None:
        """Return the cause if a part has been stopped for too long, else None."""
        now = time.monotonic()
        if now - self._probed < PROBE_S:
            return None
        self._probed = now
        # Count from the first failed probe: after a stop of this process itself, everything looks late.
        self._stopped_since = {part: self._stopped_since.get(part, now) for part in self._process.stopped_parts()}
        hanging = [part for part, since in self._stopped_since.items() if now - since >= self._hang_timeout_s]
        return f"no sign of life from {hanging[0]} for {self._hang_timeout_s:g} s" if hanging else None
