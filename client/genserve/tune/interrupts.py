"""Ctrl-C and SIGTERM as KeyboardInterrupt, except while servers are being stopped."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Handlers of the signals that end a command, for the length of a block in the main thread.

    Only the first signal counts: the command then ends by itself, within seconds.
    """

    def __init__(self) -> None:
        self._held = 0
        self._arrived = False
        self._raised = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep a signal until the end of the block."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        self._raise_if_free()

    def _on_signal(self, _: int, __: FrameType | None) -> None:
        self._arrived = True
        self._raise_if_free()

    def _raise_if_free(self) -> None:
        if self._arrived and not self._held and not self._raised:
            self._raised = True
            raise KeyboardInterrupt
