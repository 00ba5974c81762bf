"""Middleware of the gateway: request ids, and the limit on request bodies."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID = "x-request-id"
_VALID_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestIds:
    """Middleware that gives each request an id: the caller's own if it is usable, else a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _VALID_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class BodyLimit:
    """Middleware that refuses large request bodies, whether their length is announced or not.

    Args:
        app: The application.
        max_bytes: Largest accepted body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        received = int(announced) if announced.isdecimal() else 0
        refused = received > self._max_bytes
        counted = 0

        async def receive_counted() -> Message:
            nonlocal counted
            if refused:
                raise self._failure()
            message = await receive()
            counted += len(message.get("body", b""))
            if counted > self._max_bytes:
                raise self._failure()
            return message

        await self._app(scope, receive_counted, send)

    def _failure(self) -> HTTPException:
        # FastAPI turns any other exception into its own answer.
        return HTTPException(413, f"the request's body is too large; allowed: {self._max_bytes:,} bytes")
