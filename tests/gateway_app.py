"""A gateway's application before fake servers, without sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import httpx
from fake_servers import FakeServer, image, scores

from genserve import AsyncClient
from genserve.gateway.app import create_app
from genserve.gateway.settings import GatewaySettings
from genserve.protocol import Call, Outputs

T = TypeVar("T")
RERANK = {"query": "q", "documents": ["a", "bc"]}


async def complete(call: Call) -> Outputs:
    """Answer any request, images with an INFO as complete as the server's."""
    if call.model != "flux":
        return scores(call)
    outputs = image(call)
    info = {"height": 64, "width": 64, "steps": 4, "guidance": 3.5, "gpu_id": 0, "device": "cpu", "elapsed_time": 0.5}
    outputs["INFO"][0, 0] = json.dumps(info).encode()
    return outputs


@asynccontextmanager
async def gateway(
    *servers: FakeServer, client: tuple[str, int] = ("192.0.2.1", 1), **settings: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """Yield an HTTP client of a gateway, at the address `client`."""
    app = create_app(GatewaySettings(**settings), AsyncClient(transport=list(servers) or [FakeServer()]))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=client)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://gateway") as http,
    ):
        yield http


def with_gateway(ask: Callable[[httpx.AsyncClient], Awaitable[T]], *servers: FakeServer, **options: Any) -> T:
    """Return the result of `ask`, which gets an HTTP client of a gateway."""

    async def run() -> T:
        async with gateway(*servers, **options) as http:
            return await ask(http)

    return asyncio.run(run())
