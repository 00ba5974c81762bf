"""Middleware of the gateway: request ids, answers to failures, and the limits on request bodies."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from genserve.gateway.errors import Failure

REQUEST_ID = "x-request-id"
MAX_DIGITS = 18
_VALID_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

logger = logging.getLogger(__name__)


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


class Failures:
    """Middleware that answers the failures of the middleware inside of it, and defects.

    Args:
        app: The application.
        answer: Function that returns the answer in the shape of the request's dialect.
    """

    def __init__(self, app: ASGIApp, answer: Callable[[Request, Failure], ASGIApp]) -> None:
        self._app = app
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_watched)
        except Exception as error:
            if started:
                raise
            failure = error if isinstance(error, Failure) else self._defect(scope)
            await self._answer(Request(scope), failure)(scope, receive, send)

    def _defect(self, scope: Scope) -> Failure:
        fields = {"task_id": scope["state"]["request_id"]}
        logger.error("request failed", exc_info=True, extra={"fields": fields})
        return Failure(500, "ServerError", "the gateway failed; its log says why")


class BodyLimit:
    """Middleware that refuses large request bodies, whether their length is announced or not.

    Args:
        app: The application.
        max_bytes: Largest accepted body.
        max_total_bytes: Limit of the bodies of all requests in flight together.
        retry_after_s: Seconds after which a caller should try again while that limit is reached.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_total_bytes: int, retry_after_s: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_total_bytes = max_total_bytes
        self._retry_after_s = retry_after_s
        self._total = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "").lstrip("0")
        # Compared by their digits first: Python refuses to read a number of thousands of digits.
        refused = announced.isdecimal() and (len(announced) > MAX_DIGITS or int(announced) > self._max_bytes)
        counted = 0

        # FastAPI turns any other exception than HTTPException into an answer of its own.
        async def receive_counted() -> Message:
            nonlocal counted
            if refused:
                raise self._too_large()
            message = await receive()
            size = len(message.get("body", b""))
            counted += size
            self._total += size
            if counted > self._max_bytes:
                raise self._too_large()
            if self._total > self._max_total_bytes:
                headers = {"Retry-After": str(self._retry_after_s)}
                raise HTTPException(503, "too many large requests at once", headers)
            return message

        try:
            await self._app(scope, receive_counted, send)
        finally:
            self._total -= counted

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the request's body is too large; allowed: {self._max_bytes:,} bytes")
