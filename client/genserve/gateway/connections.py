"""Connections of callers, with time limits on what they send and on what they do not read."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

RECEIVE_S = 60.0
"""Seconds for all of a request to arrive, head and body, from the connection's beginning or the last answer's end. A
body of the largest size needs about 1 Mbit/s."""
STALL_S = 60.0
"""Seconds in which a caller has to read something of an answer that waits for it."""


class TimedProtocol(H11Protocol):
    """uvicorn's protocol, which has no such limits itself: connections that do nothing are closed."""

    _late: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Wait for the next request on this connection."""
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        super().pause_writing()
        self._expect_less_than(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        _cancel(self._stalled)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        _cancel(self._late)
        _cancel(self._stalled)
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Start the timer while a request is expected or incomplete."""
        if self.conn.their_state not in {h11.IDLE, h11.SEND_BODY}:
            _cancel(self._late)
            self._late = None
        elif self._late is None:
            self._late = self.loop.call_later(RECEIVE_S, self.transport.close)

    def _expect_less_than(self, size: int) -> None:
        """Close the connection unless fewer bytes wait to be sent after some time."""

        def check() -> None:
            left = self.transport.get_write_buffer_size()
            if left < size:
                self._expect_less_than(left)
            else:
                self.transport.abort()

        self._stalled = self.loop.call_later(STALL_S, check)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
