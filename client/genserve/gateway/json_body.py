"""Request bodies: JSON as RFC 8259 has it. Python's own parser accepts more, which no answer could repeat."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

MAX_FIELDS = 1_000
"""Limit of the fields of a body: each unknown one may cost a message."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class StrictRequest(Request):
    """Request whose body is UTF-8, without NaN, infinities and halves of characters."""

    async def json(self) -> Any:
        """Return the parsed body.

        Raises:
            HTTPException: It is not JSON.
        """
        body = await self.body()
        try:
            text = body.decode("utf-8-sig")
            with _without_collections():
                parsed = json.loads(text, parse_constant=_refuse)
            if isinstance(parsed, dict) and len(parsed) > MAX_FIELDS:
                raise _failure(f"it has {len(parsed):,} fields; allowed: at most {MAX_FIELDS:,}")
            if _SURROGATE.search(text):
                json.dumps(parsed, ensure_ascii=False).encode()
        except UnicodeDecodeError:
            raise _failure("it is not UTF-8") from None
        except UnicodeEncodeError:
            raise _failure("it has half of a surrogate pair") from None
        except RecursionError:
            raise _failure("it is nested too deeply") from None
        except json.JSONDecodeError as error:
            raise _failure(f"it is not JSON: {error.msg} at character {error.pos}") from None
        except ValueError:
            raise _failure("it has a number that is not finite, or has thousands of digits") from None
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


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _failure(reason: str) -> HTTPException:
    return HTTPException(400, f"the request's body is not usable: {reason}")
