"""Threads that end their process if they fail, so that its supervisor replaces it."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType

EXIT_CODE = 70
"""EX_SOFTWARE of sysexits.h."""

logger = logging.getLogger(__name__)


def start_thread(target: Callable[[], None], *, name: str) -> threading.Thread:
    """Start a daemon thread that ends the process if `target` raises.

    A thread that died silently would leave its requests waiting for ever. The end of the process is detected: the
    supervisor replaces a worker, and `genserve serve` replaces a server that lost a stub.
    """
    thread = threading.Thread(target=exit_on_failure, args=(target,), name=name, daemon=True)
    thread.start()
    return thread


def exit_on_failure(target: Callable[[], None]) -> None:
    """Run `target`; log any exception as critical and end the process.

    This includes every BaseException, such as a panic of a Rust extension.
    """
    try:
        target()
    except BaseException:
        name = threading.current_thread().name
        logger.critical("thread failed, ending the process", exc_info=True, extra={"fields": {"thread": name}})
        os._exit(EXIT_CODE)


class Busy:
    """Context manager that shows other threads how long its block has been running."""

    def __init__(self) -> None:
        self._since: float | None = None

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._since = None

    @property
    def seconds(self) -> float:
        """Seconds since the block was entered; 0 outside the block."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since
