"""Request bodies: JSON as RFC 8259 has it. Python's own parser accepts more, which no answer could repeat."""

from __future__ import annotations

import codecs
import gc
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException

MAX_FIELDS = 1_000
"""Limit of the fields of a body: each unknown one may cost a message."""


class StrictRequest(Request):
    """Request whose body is UTF-8, without NaN, halves of surrogate pairs and hundreds of levels."""

    async def json(self) -> Any:
        """Return the parsed body.

        Raises:
            HTTPException: It is not JSON.
        """
        body = (await self.body()).removeprefix(codecs.BOM_UTF8)
        try:
            with _without_collections():
                parsed = from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise _failure(f"it is not JSON: {error}") from None
        if isinstance(parsed, dict) and len(parsed) > MAX_FIELDS:
            raise _failure(f"it has {len(parsed):,} fields; allowed: at most {MAX_FIELDS:,}")
        return parsed


class StrictRoute(APIRoute):
    """Route for such bodies."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of a request."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_strictly


@contextmanager
def _without_collections() -> Iterator[None]:
    """Pause the search for garbage. It would go through the millions of lists of a hostile body many times."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _failure(reason: str) -> HTTPException:
    return HTTPException(400, f"the request's body is not usable: {reason}")
