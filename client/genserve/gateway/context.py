"""One request on its way through the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Annotated, TypeVar

from fastapi import Depends, Request

from genserve.aio import AsyncClient
from genserve.errors import GenServeError
from genserve.gateway.errors import Failure
from genserve.gateway.settings import GatewaySettings

T = TypeVar("T")

GONE = Failure(499, "Cancelled", "the caller has gone")


class Context:
    """Client, settings and id of a request. Work ends when the caller goes away."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self.client: AsyncClient = request.app.state.client
        self.settings: GatewaySettings = request.app.state.settings
        self.id: str = request.state.request_id

    async def run(self, work: Awaitable[T]) -> T:
        """Return the result of `work`, which is cancelled if the caller hangs up.

        Raises:
            Failure: The work failed, or the caller has gone.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(self._hung_up())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise GONE
            return task.result()
        except GenServeError as error:
            raise self.failure(error) from error
        finally:
            gone.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    def failure(self, error: GenServeError) -> Failure:
        """Return the failure for an exception of the client."""
        return Failure.of(error, retry_after_s=self.settings.retry_after_s)

    async def _hung_up(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass


InContext = Annotated[Context, Depends(Context)]
"""Parameter of a route."""
