"""How long something takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def timed(call: Callable[[], None], repeats: int) -> float:
    """The median of some runs, in seconds, after one that is not counted."""
    call()
    seconds = []
    for _ in range(repeats):
        started = time.monotonic()
        call()
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds)
