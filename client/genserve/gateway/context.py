"""One request on its way through the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from genserve.aio import AsyncClient
from genserve.errors import GenServeError
from genserve.gateway.durable import Durable
from genserve.gateway.errors import Failure
from genserve.gateway.line import Line
from genserve.gateway.settings import GatewaySettings
from genserve.types import GeneratedImage, Priority

T = TypeVar("T")

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Context:
    """Client, settings and id of a request. Work ends when the caller goes away."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self.client: AsyncClient = request.app.state.client
        self.settings: GatewaySettings = request.app.state.settings
        self.line: Line = request.app.state.line
        self.durable: Durable = request.app.state.durable
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
                gone.result()  # raises if it read a body that is too large
                raise Failure(499, "Cancelled", "the caller has gone")
            return task.result()
        except GenServeError as error:
            raise self.failure(error) from error
        finally:
            gone.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
                _ = task.cancelled() or task.exception()  # asyncio would log it as forgotten

    async def generate(self, prompt: str, *, task_id: str, priority: Priority, **arguments: Any) -> GeneratedImage:
        """Return an image as `AsyncClient.generate` does. Meanwhile the request stands in the gateway's line."""
        with self.line.standing(task_id, priority):
            return await self.client.generate(prompt, task_id=task_id, priority=priority, **arguments)

    def failure(self, error: GenServeError) -> Failure:
        """Return the failure for an exception of the client."""
        return Failure.of(error, retry_after_s=self.settings.retry_after_s)

    def link(self, path: str) -> str:
        """Return the URL of a path of this gateway.

        The name that a caller uses for the gateway is the caller's claim. Without a public URL, it is repeated only if
        it is this machine's own; otherwise the URL is the path alone.
        """
        url = self._request.url
        try:
            is_own = url.hostname in LOOPBACK and (url.port is None or url.port > 0)
        except ValueError:  # The caller's Host is no name.
            is_own = False
        if self.settings.public_url or not is_own:
            return self.settings.public_link(path)
        return f"{url.scheme}://{url.netloc}{path}"

    async def _hung_up(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass


async def _context(request: Request) -> Context:
    return Context(request)  # FastAPI would call the class itself in a thread.


InContext = Annotated[Context, Depends(_context)]
"""Parameter of a route."""
