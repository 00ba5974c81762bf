"""LangChain's and LlamaIndex' retrieval with a real server."""

from __future__ import annotations

import asyncio

import pytest
from conftest import Server
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.llms import MockLLM
from llama_index.core.schema import NodeWithScore, TextNode

from genserve import AsyncClient, Client
from genserve.integrations import langchain, llama_index

TEXTS = [
    "Berlin is the capital of Germany.",
    "Paris is the capital of France.",
    "A croissant is a pastry.",
    "Paris is the capital of France.",
]
QUESTION = "What is the capital of France?"


def scores(url: str) -> list[float]:
    """Return the server's own scores of TEXTS."""
    with Client(url) as client:
        return list(client.rerank(QUESTION, TEXTS).scores)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_langchain_retriever(protocol: str, server: Server) -> None:
    url = server.url(protocol)
    store = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    store.add_documents([Document(text, id=str(index)) for index, text in enumerate(TEXTS)])
    found = store.as_retriever(search_kwargs={"k": len(TEXTS)})
    retriever = ContextualCompressionRetriever(
        base_compressor=langchain.GenServeRerank(url=url, top_n=3), base_retriever=found
    )
    best = retriever.invoke(QUESTION)
    assert {each.id for each in best[:2]} == {"1", "3"}
    assert best[2].id == "0"
    expected = scores(url)
    assert [each.metadata["relevance_score"] for each in best] == pytest.approx(
        [expected[int(str(each.id))] for each in best], abs=1e-4
    )

    async def ask() -> list[Document]:
        async with AsyncClient(url) as client:
            reranker = langchain.GenServeRerank(async_client=client, top_n=3)
            retriever = ContextualCompressionRetriever(base_compressor=reranker, base_retriever=found)
            return await retriever.ainvoke(QUESTION)

    assert [each.page_content for each in asyncio.run(ask())] == [each.page_content for each in best]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_llama_index_query(protocol: str, server: Server) -> None:
    url = server.url(protocol)
    nodes = [TextNode(id_=str(index), text=text) for index, text in enumerate(TEXTS)]
    index = VectorStoreIndex(nodes, embed_model=MockEmbedding(8))

    def engine(reranker: llama_index.GenServeRerank) -> BaseQueryEngine:
        return index.as_query_engine(llm=MockLLM(), similarity_top_k=len(nodes), node_postprocessors=[reranker])

    async def ask() -> list[NodeWithScore]:
        async with AsyncClient(url) as client:
            answer = await engine(llama_index.GenServeRerank(async_client=client, top_n=3)).aquery(QUESTION)
            return answer.source_nodes

    best = engine(llama_index.GenServeRerank(url=url, top_n=3)).query(QUESTION).source_nodes
    assert {each.node_id for each in best[:2]} == {"1", "3"}
    assert best[2].node_id == "0"
    expected = scores(url)
    assert [each.score for each in best] == pytest.approx([expected[int(each.node_id)] for each in best], abs=1e-4)
    assert [each.text for each in asyncio.run(ask())] == [each.text for each in best]
