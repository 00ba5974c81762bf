"""Transports: the interface to one server, and the choice between gRPC, HTTP and custom ones."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from genserve.access import TLS, Address, checked_headers
from genserve.errors import ServerUnavailable
from genserve.protocol import Call, Outputs

THREADS = 256
"""Maximum number of requests at once through a synchronous transport."""

T = TypeVar("T")


class Transport(Protocol):
    """Synchronous transport to one server, as a replacement for a server in tests: ``Client(transport=...)``.

    Its methods run in threads, several at a time. It answers with arrays by output name, in the shapes of the models'
    ``config.pbtxt``, and raises GenServeErrors.
    """

    url: str

    def infer(self, call: Call, timeout_s: float) -> Outputs:
        """Send a request and return its outputs within `timeout_s` seconds, or raise a GenServeError."""

    def live(self) -> bool:
        """Return whether the server answers."""

    def ready(self) -> bool:
        """Return whether every model is ready."""

    def metadata(self) -> dict[str, Any]:
        """Return Triton's name and version."""

    def models(self) -> list[dict[str, Any]]:
        """Return the repository index: name, version, state, reason."""

    def statistics(self) -> list[dict[str, Any]]:
        """Return Triton's statistics per model."""

    def close(self) -> None:
        """Close the connection."""


class AsyncTransport(Protocol):
    """Transport to one server, for use in one event loop at a time. See `Transport` for the methods."""

    url: str

    async def infer(self, call: Call, timeout_s: float) -> Outputs:
        """See Transport."""

    async def live(self) -> bool:
        """See Transport."""

    async def ready(self, model: str = "") -> bool:
        """Return whether a model is ready; without a name, whether every model is."""

    async def metadata(self) -> dict[str, Any]:
        """See Transport."""

    async def models(self) -> list[dict[str, Any]]:
        """See Transport."""

    async def statistics(self) -> list[dict[str, Any]]:
        """See Transport."""

    async def close(self) -> None:
        """See Transport."""


class ThreadTransport:
    """Asynchronous adapter of a synchronous transport."""

    def __init__(self, transport: Transport) -> None:
        self.url = transport.url
        self._transport = transport
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="genserve-transport")

    async def infer(self, call: Call, timeout_s: float) -> Outputs:
        """See Transport."""
        return await self._run(self._transport.infer, call, timeout_s)

    async def live(self) -> bool:
        """See Transport."""
        return await self._run(self._transport.live)

    async def ready(self, model: str = "") -> bool:
        """See AsyncTransport."""
        # A test's own transport may only have the methods that its test needs.
        return not hasattr(self._transport, "ready") or await self._run(self._transport.ready)

    async def metadata(self) -> dict[str, Any]:
        """See Transport."""
        return await self._run(self._transport.metadata)

    async def models(self) -> list[dict[str, Any]]:
        """See Transport."""
        return await self._run(self._transport.models)

    async def statistics(self) -> list[dict[str, Any]]:
        """See Transport."""
        return await self._run(self._transport.statistics)

    async def close(self) -> None:
        """See Transport."""
        self._threads.shutdown(wait=False)
        self._transport.close()

    async def _run(self, method: Callable[..., T], *arguments: Any) -> T:
        try:
            answer = self._threads.submit(method, *arguments)
        except RuntimeError:  # as at the end of the process
            raise ServerUnavailable(f"{self.url}: the transport is closed") from None
        return await asyncio.wrap_future(answer)


def adapted(transport: Transport | AsyncTransport) -> AsyncTransport:
    """Return the transport itself if it is asynchronous, else an adapter of it."""
    if inspect.iscoroutinefunction(transport.infer):
        return transport  # type: ignore[return-value]
    return ThreadTransport(transport)  # type: ignore[arg-type]


def connect(url: str, *, tls: TLS | None = None, headers: Mapping[str, str] | None = None) -> AsyncTransport:
    """Return a transport for an address. It connects on first use.

    Args:
        url: ``host:port``, ``grpc://host:port`` or ``grpcs://host[:port]`` for gRPC; ``http://host[:port][/prefix]`` or
            ``https://host[:port][/prefix]`` for HTTP.
        tls: Certificates for ``grpcs://`` and ``https://``.
        headers: Headers of every request; over gRPC they are metadata.

    Raises:
        InvalidInput: The address, a file of `tls` or a header is not usable.
    """
    return connect_to(Address.parse(url), url, tls=tls or TLS(), headers=checked_headers(headers))


def connect_to(address: Address, url: str, *, tls: TLS, headers: dict[str, str]) -> AsyncTransport:
    """Return a transport for a parsed address; `url` is its name in messages."""
    # Both are slow to import, and most programs need only one.
    if address.is_grpc:
        from genserve.grpc_transport import GrpcTransport

        return GrpcTransport(url, address, tls, headers)
    from genserve.http_transport import HttpTransport

    return HttpTransport(url, address, tls, headers)
