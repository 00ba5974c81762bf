"""Reranking as the frameworks' adapters need it: from synchronous and asynchronous code, with the same settings."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from genserve.aio import AsyncClient
from genserve.client import Client
from genserve.errors import InvalidInput
from genserve.types import Ranking


class RerankSettings(TypedDict):
    """Arguments of a rerank call that an adapter sets."""

    top_n: int | None
    instruction: str | None
    windows: int


@dataclass(frozen=True)
class Reranker:
    """Clients of an adapter.

    Attributes:
        client: Client of synchronous calls.
        async_client: Client of asynchronous calls.
    """

    client: Client | None
    async_client: AsyncClient | None

    @classmethod
    def of(cls, client: Client | None, async_client: AsyncClient | None, url: str | Sequence[str] | None) -> Reranker:
        """Return the given clients, or else both kinds for an address.

        Raises:
            InvalidInput: Clients and an address are given, or the address is not usable.
        """
        if client is None and async_client is None:
            return cls(Client(url), AsyncClient(url))
        if url is not None:
            raise InvalidInput("url is given together with a client; allowed: either")
        return cls(client, async_client)

    def rerank(self, query: str, documents: Sequence[str], settings: RerankSettings) -> Ranking:
        """Rank documents as `Client.rerank` does.

        Raises:
            InvalidInput: There is only an `async_client`.
            GenServeError: See `genserve.errors`.
        """
        if self.client is None:
            raise InvalidInput("only async_client is given; allowed for synchronous calls: client or url")
        return self.client.rerank(query, documents, **settings)

    async def arerank(self, query: str, documents: Sequence[str], settings: RerankSettings) -> Ranking:
        """Rank documents as `AsyncClient.rerank` does, or in a thread if there is only a `client`.

        Raises:
            GenServeError: See `genserve.errors`.
        """
        if self.async_client is None:
            return await asyncio.to_thread(self.rerank, query, documents, settings)
        return await self.async_client.rerank(query, documents, **settings)
