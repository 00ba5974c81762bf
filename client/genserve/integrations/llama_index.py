"""LlamaIndex: reranking of retrieved nodes.

>>> from genserve.integrations.llama_index import GenServeRerank
>>> reranker = GenServeRerank(url="localhost:8001", top_n=3)
>>> engine = index.as_query_engine(similarity_top_k=50, node_postprocessors=[reranker])
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

try:
    from llama_index.core.callbacks import CBEventType, EventPayload
    from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]  # without __all__
    from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
except ModuleNotFoundError as error:
    raise ImportError(
        "genserve.integrations.llama_index needs LlamaIndex: pip install 'genserve[llama-index]'"
    ) from error
from pydantic import Field, PrivateAttr

from genserve.aio import AsyncClient
from genserve.client import Client
from genserve.integrations.reranking import Reranker, RerankSettings
from genserve.types import Ranking

MODEL = "rerank"
"""Name of the model in LlamaIndex's events: GenServe's reranker."""

dispatcher = get_dispatcher(__name__)


class GenServeRerank(BaseNodePostprocessor):
    """Node postprocessor that keeps the best nodes, ranked by a GenServe server.

    The server gets each node's text with the metadata meant for embeddings, and the result has the server's scores.

    Attributes:
        url: Address of a server or a list of addresses, for clients of its own. Default: ``localhost:8001``.
        top_n: Number of nodes to return; None returns all.
        instruction: Task instruction of instruction-tuned rerankers; None selects the model's own.
        windows: Maximum number of overlapping windows, 1 to 64, per long text; 1 truncates it.
    """

    url: str | list[str] | None = Field(default=None, description="Address of a server, or a list of addresses.")
    top_n: int | None = Field(default=None, ge=1, description="Number of nodes to return.")
    instruction: str | None = Field(default=None, description="Task instruction of instruction-tuned rerankers.")
    windows: int = Field(default=1, ge=1, le=64, description="Maximum number of windows per long text.")

    _reranker: Reranker = PrivateAttr()

    def __init__(
        self, client: Client | None = None, *, async_client: AsyncClient | None = None, **settings: Any
    ) -> None:
        """Connect.

        Args:
            client: Client of synchronous calls; asynchronous ones use it in a thread if there is no `async_client`.
            async_client: Client of asynchronous calls.
            settings: The attributes of the class.

        Raises:
            InvalidInput: Clients and an address are given, or the address is not usable.
        """
        super().__init__(**settings)
        self._reranker = Reranker.of(client, async_client, self.url)

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex stores the class."""
        return "GenServeRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = _query(query_bundle)
        if not nodes:
            return []
        with self._reported(nodes, query) as ranked:
            ranking = self._reranker.rerank(query.query_str, _texts(nodes), self._settings())
            ranked.extend(_ranked(nodes, ranking))
        return ranked

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = _query(query_bundle)
        if not nodes:
            return []
        with self._reported(nodes, query) as ranked:
            ranking = await self._reranker.arerank(query.query_str, _texts(nodes), self._settings())
            ranked.extend(_ranked(nodes, ranking))
        return ranked

    def _settings(self) -> RerankSettings:
        return {"top_n": self.top_n, "instruction": self.instruction, "windows": self.windows}

    @contextmanager
    def _reported(self, nodes: list[NodeWithScore], query: QueryBundle) -> Iterator[list[NodeWithScore]]:
        """Report the ranking to LlamaIndex's observers, of the old and the new kind. The block fills the list."""
        ranked: list[NodeWithScore] = []
        top_n = self.top_n or len(nodes)
        dispatcher.event(ReRankStartEvent(query=query, nodes=nodes, top_n=top_n, model_name=MODEL))
        payload: dict[str, Any] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: MODEL,
            EventPayload.QUERY_STR: query.query_str,
            EventPayload.TOP_K: top_n,
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            yield ranked
            event.on_end(payload={EventPayload.NODES: ranked})
        dispatcher.event(ReRankEndEvent(nodes=ranked))


def _query(query_bundle: QueryBundle | None) -> QueryBundle:
    if query_bundle is None:
        raise ValueError("GenServeRerank needs the query: pass query_bundle or query_str")
    return query_bundle


def _texts(nodes: list[NodeWithScore]) -> list[str]:
    return [each.node.get_content(metadata_mode=MetadataMode.EMBED) for each in nodes]


def _ranked(nodes: list[NodeWithScore], ranking: Ranking) -> list[NodeWithScore]:
    """Return the nodes with their new scores, in the order of the ranking."""
    return [NodeWithScore(node=nodes[each.index].node, score=each.score) for each in ranking]
