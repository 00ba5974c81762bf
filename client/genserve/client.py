"""Synchronous client: the verbs of `genserve.aio.AsyncClient` without asyncio."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from genserve.access import TLS
from genserve.aio import DEFAULT_TIMEOUT_S, AsyncClient, GivenTransport
from genserve.background import LOOP
from genserve.bulk import BulkCall, MapResult
from genserve.handles import Task

P = ParamSpec("P")
T = TypeVar("T")


def _synchronous(
    verb: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Client, P], T]:
    """Return the verb for `Client`. A function given as `on_progress` is called in the caller's thread."""

    @functools.wraps(verb)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        client = self._client
        on_progress = kwargs.pop("on_progress", None)
        if on_progress is None:
            return LOOP.run(verb(client, *args, **kwargs))
        return LOOP.run_with_calls(
            lambda call: verb(client, *args, **{**kwargs, "on_progress": call}),  # type: ignore[arg-type]
            on_progress,
        )

    return call


def _blocking(
    verb: Callable[Concatenate[AsyncClient, P], BulkCall[T]],
) -> Callable[Concatenate[Client, P], Iterator[MapResult[T]]]:
    """Return the bulk verb for `Client`."""

    @functools.wraps(verb)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[MapResult[T]]:
        return verb(self._client, *args, **kwargs).blocking()

    return call


class Client:
    """Client for one GenServe server, or for several that share its requests. Thread-safe.

    It has the verbs of `AsyncClient`, which it runs in one background thread for all clients of the process. A call
    that is interrupted, as by Ctrl-C, cancels its request on the server.

    Args:
        url: ``host:port`` or ``grpcs://host`` for gRPC, ``http://host:port`` or ``https://host/prefix`` for HTTP, or a
            list of either. Default: ``localhost:8001``. A DNS name with several addresses counts as several servers.
        timeout: Default deadline of a call, in seconds. Servers receive it and abort a request that passes it.
        retry_for: Seconds to retry while no server is reachable or a gateway asks to retry later. 0 fails at once.
        tls: Certificates for ``grpcs://`` and ``https://``.
        headers: Headers of every request, as ``{"Authorization": "Bearer ..."}``; over gRPC they are metadata.
        transport: One or several custom transports in place of `url`, `tls` and `headers`, for tests of code that uses
            a Client. See `genserve.Transport`.

    Raises:
        InvalidInput: An argument is not usable.
    """

    def __init__(
        self,
        url: str | Sequence[str] | None = None,
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        retry_for: float = 0.0,
        tls: TLS | None = None,
        headers: Mapping[str, str] | None = None,
        transport: GivenTransport | Sequence[GivenTransport] | None = None,
    ) -> None:
        self._client = AsyncClient(
            url, timeout=timeout, retry_for=retry_for, tls=tls, headers=headers, transport=transport
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, prompt: str, **arguments: Any) -> Task:
        """Start to generate an image, and return its task at once.

        Args:
            prompt: 1 to 10,000 characters.
            **arguments: The arguments of `generate`, except `on_progress`.
        """

        async def start() -> Task:
            return Task(self._client.submit(prompt, **arguments))

        return LOOP.run(start())

    close = _synchronous(AsyncClient.close)
    generate = _synchronous(AsyncClient.generate)
    rerank = _synchronous(AsyncClient.rerank)
    map_generate = _blocking(AsyncClient.map_generate)
    map_rerank = _blocking(AsyncClient.map_rerank)
    map = _blocking(AsyncClient.map)
    task = _synchronous(AsyncClient.task)
    cancel = _synchronous(AsyncClient.cancel)
    health = _synchronous(AsyncClient.health)
    status = _synchronous(AsyncClient.status)
    models = _synchronous(AsyncClient.models)
    gpu_load = _synchronous(AsyncClient.gpu_load)
    config = _synchronous(AsyncClient.config)
