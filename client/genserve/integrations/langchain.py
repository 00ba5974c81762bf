"""LangChain: reranking of retrieved documents.

>>> from genserve.integrations.langchain import GenServeRerank
>>> reranker = GenServeRerank(url="localhost:8001", top_n=3)
>>> best = reranker.compress_documents(documents, "capital of France")
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

try:
    from langchain_core.callbacks import Callbacks
    from langchain_core.documents import BaseDocumentCompressor, Document
except ModuleNotFoundError as error:
    raise ImportError("genserve.integrations.langchain needs LangChain: pip install 'genserve[langchain]'") from error
from pydantic import ConfigDict, Field, PrivateAttr

from genserve.aio import AsyncClient
from genserve.client import Client
from genserve.integrations.reranking import Reranker, RerankSettings
from genserve.types import Ranking


class GenServeRerank(BaseDocumentCompressor):
    """Document compressor that keeps the best documents, ranked by a GenServe server.

    The results are copies of the documents, with the score in ``metadata["relevance_score"]``.

    Attributes:
        client: Client of synchronous calls; asynchronous ones use it in a thread if there is no `async_client`.
        async_client: Client of asynchronous calls.
        url: Address of a server or a list of addresses, for clients of its own. Default: ``localhost:8001``.
        top_n: Number of documents to return; None returns all.
        instruction: Task instruction of instruction-tuned rerankers; None selects the model's own.
        windows: Maximum number of overlapping windows, 1 to 64, per long document; 1 truncates it.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    client: Client | None = Field(default=None, exclude=True, repr=False)
    async_client: AsyncClient | None = Field(default=None, exclude=True, repr=False)
    url: str | list[str] | None = None
    top_n: int | None = Field(default=None, ge=1)
    instruction: str | None = None
    windows: int = Field(default=1, ge=1, le=64)

    _reranker: Reranker = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Connect.

        Raises:
            InvalidInput: Clients and an address are given, or the address is not usable.
        """
        self._reranker = Reranker.of(self.client, self.async_client, self.url)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return the best documents for a query, the best first.

        Raises:
            InvalidInput: There is only an `async_client`, or the server rejects a value.
            GenServeError: See `genserve.errors`.
        """
        if not documents:
            return []
        return _ranked(documents, self._reranker.rerank(query, _texts(documents), self._settings()))

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return the best documents for a query, the best first.

        Raises:
            GenServeError: See `genserve.errors`.
        """
        if not documents:
            return []
        return _ranked(documents, await self._reranker.arerank(query, _texts(documents), self._settings()))

    def _settings(self) -> RerankSettings:
        return {"top_n": self.top_n, "instruction": self.instruction, "windows": self.windows}


def _texts(documents: Sequence[Document]) -> list[str]:
    return [document.page_content for document in documents]


def _ranked(documents: Sequence[Document], ranking: Ranking) -> list[Document]:
    """Return copies of the documents in the order of the ranking, which goes by index: texts may be equal."""
    return [
        documents[each.index].model_copy(
            update={"metadata": {**copy.deepcopy(documents[each.index].metadata), "relevance_score": each.score}}
        )
        for each in ranking
    ]
