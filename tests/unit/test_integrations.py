"""LangChain's and LlamaIndex' adapters, with the real packages and a fake server."""

from __future__ import annotations

import asyncio
import copy
import importlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.llms import MockLLM
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from pydantic import ValidationError

from genserve import AsyncClient, Call, Client, GenServeError, InvalidInput, Outputs, QueueFull, ServerUnavailable
from genserve.integrations import langchain, llama_index

TEXTS = ["short", "the longest of all", "in between", "short"]
BEST_FIRST = [1, 2, 0, 3]
"""Indices of TEXTS by the fake server's scores; equal texts keep their order."""


class FakeServer:
    """Server that scores a document by its length."""

    url = "fake"

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.error: GenServeError | None = None

    def infer(self, call: Call, timeout_s: float) -> Outputs:
        self.calls.append(call)
        if self.error:
            raise self.error
        scores = [len(document) / 100 for document in call.inputs["DOCUMENTS"][0]]
        return {
            "SCORES": np.array([scores], dtype=np.float32),
            "INFO": np.array([[json.dumps({}).encode()]], dtype=np.object_),
        }

    def texts(self) -> list[str]:
        (call,) = self.calls
        return [text.decode() for text in call.inputs["DOCUMENTS"][0]]

    def close(self) -> None:
        pass


@pytest.fixture
def fake_server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def client(fake_server: FakeServer) -> Iterator[Client]:
    with Client(transport=fake_server) as client:
        yield client


def score(text: str) -> Any:
    return pytest.approx(len(text) / 100)


ADAPTERS = pytest.mark.parametrize("module", [langchain, llama_index], ids=["langchain", "llama-index"])


def run(module: Any, reranker: Any, texts: list[str], *, is_async: bool = False) -> list[str]:
    """Rank texts with either adapter and return them in the new order."""
    if module is langchain:
        documents = [Document(text) for text in texts]
        if is_async:
            return [each.page_content for each in asyncio.run(reranker.acompress_documents(documents, "query"))]
        return [each.page_content for each in reranker.compress_documents(documents, "query")]
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in texts]
    if is_async:
        return [each.text for each in asyncio.run(reranker.apostprocess_nodes(nodes, query_str="query"))]
    return [each.text for each in reranker.postprocess_nodes(nodes, query_str="query")]


# Both.


@ADAPTERS
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_settings_are_sent(module: Any, is_async: bool, client: Client, fake_server: FakeServer) -> None:
    reranker = module.GenServeRerank(client=client, top_n=2, instruction="i", windows=4)
    assert run(module, reranker, TEXTS, is_async=is_async) == [TEXTS[1], TEXTS[2]]
    (call,) = fake_server.calls
    assert call.inputs["QUERY"].item() == b"query"
    assert call.inputs["INSTRUCTION"].item() == b"i"
    assert call.inputs["WINDOWS"].item() == 4
    assert fake_server.texts() == TEXTS


@ADAPTERS
def test_model_decides_what_is_not_set(module: Any, client: Client, fake_server: FakeServer) -> None:
    assert run(module, module.GenServeRerank(client=client), TEXTS) == [TEXTS[index] for index in BEST_FIRST]
    assert fake_server.calls[0].inputs.keys() == {"QUERY", "DOCUMENTS"}


@ADAPTERS
def test_each_kind_of_call_has_its_client(module: Any) -> None:
    sync_server, async_server = FakeServer(), FakeServer()
    client, async_client = Client(transport=sync_server), AsyncClient(transport=async_server)
    reranker = module.GenServeRerank(client=client, async_client=async_client)
    run(module, reranker, ["a"], is_async=True)
    assert (len(sync_server.calls), len(async_server.calls)) == (0, 1)
    run(module, reranker, ["a"])
    assert (len(sync_server.calls), len(async_server.calls)) == (1, 1)
    run(module, reranker, ["a"], is_async=True)  # in another event loop
    assert (len(sync_server.calls), len(async_server.calls)) == (1, 2)


@ADAPTERS
def test_synchronous_call_needs_a_synchronous_client(module: Any, fake_server: FakeServer) -> None:
    reranker = module.GenServeRerank(async_client=AsyncClient(transport=fake_server))
    assert run(module, reranker, ["a"], is_async=True) == ["a"]
    with pytest.raises(InvalidInput, match="only async_client is given"):
        run(module, reranker, ["a"])


@ADAPTERS
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("url", ["localhost:1", ["localhost:1", "localhost:2"]], ids=["one", "two"])
def test_clients_are_made_for_an_address(module: Any, is_async: bool, url: str | list[str]) -> None:
    with pytest.raises(ServerUnavailable, match="localhost:"):
        run(module, module.GenServeRerank(url=url), ["a"], is_async=is_async)


@ADAPTERS
def test_unusable_arguments_are_rejected_at_once(module: Any, client: Client) -> None:
    with pytest.raises(InvalidInput, match="url is 'nonsense'"):
        module.GenServeRerank(url="nonsense")
    with pytest.raises(InvalidInput, match="url is given together with a client"):
        module.GenServeRerank(client=client, url="localhost:1")
    for setting in ({"top_n": 0}, {"windows": 0}, {"windows": 65}):
        with pytest.raises(ValidationError, match=next(iter(setting))):
            module.GenServeRerank(client=client, **setting)


@ADAPTERS
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_nothing_to_rank_needs_no_server(module: Any, is_async: bool, client: Client, fake_server: FakeServer) -> None:
    assert run(module, module.GenServeRerank(client=client), [], is_async=is_async) == []
    assert fake_server.calls == []


@ADAPTERS
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_errors_reach_the_caller(module: Any, is_async: bool, client: Client, fake_server: FakeServer) -> None:
    fake_server.error = QueueFull("full")
    with pytest.raises(QueueFull, match="full"):
        run(module, module.GenServeRerank(client=client), ["a"], is_async=is_async)


@ADAPTERS
def test_settings_are_serialized_without_clients(module: Any, client: Client) -> None:
    settings = {"url": None, "top_n": 2, "instruction": None, "windows": 1}
    dumped = module.GenServeRerank(client=client, top_n=2).model_dump()
    assert {name: value for name, value in dumped.items() if name != "class_name"} == settings


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("langchain", "langchain_core.callbacks", "langchain"),
        ("llama_index", "llama_index.core.callbacks", "llama-index"),
    ],
)
def test_missing_framework_says_what_to_install(
    name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"genserve.integrations.{name}")
    with pytest.raises(ImportError, match=rf"pip install 'genserve\[{extra}\]'"):
        importlib.import_module(f"genserve.integrations.{name}")


# LangChain.


def documents() -> list[Document]:
    return [
        Document(text, id=str(index), metadata={"source": {"page": index}, "relevance_score": -1.0})
        for index, text in enumerate(TEXTS)
    ]


class FixedRetriever(BaseRetriever):
    """Retriever that finds the same documents for every query."""

    found: list[Document]

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return self.found


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_documents_are_ranked_copies(is_async: bool, client: Client) -> None:
    given = documents()
    before = copy.deepcopy(given)
    reranker = langchain.GenServeRerank(client=client)
    ranked = (
        asyncio.run(reranker.acompress_documents(given, "query"))
        if is_async
        else reranker.compress_documents(given, "query")
    )
    assert [each.id for each in ranked] == [str(index) for index in BEST_FIRST]  # equal texts stay apart
    assert [each.metadata["source"] for each in ranked] == [{"page": index} for index in BEST_FIRST]
    assert [each.metadata["relevance_score"] for each in ranked] == [score(each.page_content) for each in ranked]
    assert given == before
    ranked[0].metadata["source"]["page"] = 99
    assert given == before


def test_retriever_returns_the_best_documents(client: Client) -> None:
    retriever = ContextualCompressionRetriever(
        base_compressor=langchain.GenServeRerank(client=client, top_n=2),
        base_retriever=FixedRetriever(found=documents()),
    )
    assert [each.page_content for each in retriever.invoke("query")] == [TEXTS[1], TEXTS[2]]
    assert [each.page_content for each in asyncio.run(retriever.ainvoke("query"))] == [TEXTS[1], TEXTS[2]]


def test_misspelt_setting_is_rejected(client: Client) -> None:
    with pytest.raises(ValidationError, match="topn"):
        langchain.GenServeRerank(client=client, topn=3)  # type: ignore[call-arg]


# LlamaIndex.


def nodes() -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(id_=str(index), text=text), score=-1.0) for index, text in enumerate(TEXTS)]


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_nodes_get_scores_and_their_order(is_async: bool, client: Client) -> None:
    given = nodes()
    reranker = llama_index.GenServeRerank(client)
    query = QueryBundle("query")
    ranked = (
        asyncio.run(reranker.apostprocess_nodes(given, query)) if is_async else reranker.postprocess_nodes(given, query)
    )
    assert [each.node_id for each in ranked] == [str(index) for index in BEST_FIRST]  # equal texts stay apart
    assert [each.score for each in ranked] == [score(each.text) for each in ranked]
    assert [each.score for each in given] == [-1.0] * len(given)


def test_node_is_sent_with_the_metadata_for_embeddings(client: Client, fake_server: FakeServer) -> None:
    node = TextNode(text="text", metadata={"title": "t", "secret": "s"}, excluded_embed_metadata_keys=["secret"])
    llama_index.GenServeRerank(client).postprocess_nodes([NodeWithScore(node=node)], query_str="query")
    assert fake_server.texts() == ["title: t\n\ntext"]


@pytest.mark.parametrize("given", [[], nodes()], ids=["empty", "nodes"])
def test_missing_query_is_an_error(given: list[NodeWithScore], client: Client) -> None:
    reranker, message = llama_index.GenServeRerank(client), "needs the query: pass query_bundle or query_str"
    with pytest.raises(ValueError, match=message):
        reranker.postprocess_nodes(given)
    with pytest.raises(ValueError, match=message):
        asyncio.run(reranker.apostprocess_nodes(given))


class Recorder(BaseEventHandler):
    """Handler that keeps all events."""

    events: list[BaseEvent] = []  # noqa: RUF012  # a pydantic field, copied for each handler

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        self.events.append(event)


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder, dispatcher = Recorder(), get_dispatcher()
    dispatcher.add_event_handler(recorder)
    yield recorder
    dispatcher.event_handlers.remove(recorder)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(("top_n", "reported"), [(2, 2), (None, len(TEXTS))])
def test_observers_are_told(
    top_n: int | None, reported: int, is_async: bool, client: Client, recorder: Recorder
) -> None:
    handler = LlamaDebugHandler(print_trace_on_end=False)
    reranker = llama_index.GenServeRerank(client, top_n=top_n, callback_manager=CallbackManager([handler]))
    run(llama_index, reranker, TEXTS, is_async=is_async)
    start, end = (each for each in recorder.events if isinstance(each, (ReRankStartEvent, ReRankEndEvent)))
    assert isinstance(start, ReRankStartEvent)
    assert isinstance(end, ReRankEndEvent)
    assert isinstance(start.query, QueryBundle)
    assert (start.query.query_str, start.top_n, start.model_name) == ("query", reported, "rerank")
    assert (len(start.nodes), len(end.nodes)) == (len(TEXTS), reported)
    ((first, last),) = handler.get_event_pairs(CBEventType.RERANKING)
    assert first.payload is not None
    assert last.payload is not None
    assert first.payload[EventPayload.TOP_K] == reported
    assert len(last.payload[EventPayload.NODES]) == reported


def test_query_engine_returns_the_best_nodes(client: Client) -> None:
    index = VectorStoreIndex([each.node for each in nodes()], embed_model=MockEmbedding(4))
    engine = index.as_query_engine(
        llm=MockLLM(),
        similarity_top_k=len(TEXTS),
        node_postprocessors=[llama_index.GenServeRerank(client, top_n=2)],
    )
    assert [each.text for each in engine.query("query").source_nodes] == [TEXTS[1], TEXTS[2]]
    answer = asyncio.run(engine.aquery("query"))
    assert [each.text for each in answer.source_nodes] == [TEXTS[1], TEXTS[2]]


def test_class_name_is_the_one_in_stored_pipelines() -> None:
    assert llama_index.GenServeRerank.class_name() == "GenServeRerank"
