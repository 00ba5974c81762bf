"""W3C trace context: the caller's, or a new one, passed on to the servers."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from genserve.wire import passing_on

MAX_STATE_CHARACTERS = 512
"""Length that every receiver has to pass on; a longer state is dropped as a whole."""
_PARENT = re.compile(
    r"(?!ff)(?P<version>[0-9a-f]{2})-(?!0{32})(?P<trace>[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?P<more>-.*)?"
)
_STATE = re.compile(r"[ -~]+")


@dataclass(frozen=True)
class TraceContext:
    """Place of a request in a trace.

    Attributes:
        trace_id: 32 hexadecimal digits.
        headers: Headers that carry the context to the next service.
    """

    trace_id: str
    headers: dict[str, str]

    @classmethod
    def of(cls, headers: Headers) -> TraceContext:
        """Return the caller's context, unchanged, or a new one if it is missing or invalid.

        The gateway records no spans, so the servers' spans are children of the caller's.
        """
        parents = headers.getlist("traceparent")
        parent = _PARENT.fullmatch(parents[0]) if len(parents) == 1 else None
        if not parent or (parent["version"] == "00" and parent["more"]):
            trace_id = secrets.token_hex(16)
            # Not sampled: nobody has asked for spans.
            return cls(trace_id, {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-00"})
        state = ",".join(headers.getlist("tracestate"))
        is_usable = len(state) <= MAX_STATE_CHARACTERS and _STATE.fullmatch(state)
        return cls(parent["trace"], {"traceparent": parents[0], **({"tracestate": state} if is_usable else {})})


class Tracing:
    """Middleware that passes the trace context on with every request to a server."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = TraceContext.of(Headers(scope=scope))
        scope.setdefault("state", {})["trace_id"] = context.trace_id
        with passing_on(context.headers):
            await self._app(scope, receive, send)
