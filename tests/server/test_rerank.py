"""`rerank` through the client, over gRPC and HTTP."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import Server, wait_until

from genserve import Client, InvalidInput
from genserve_backend.worker.engine import HEARTBEAT_S

DOCUMENTS = [
    "Berlin is the capital of Germany.",
    "Paris is the capital of France.",
    "A croissant is a pastry.",
    "",
]
QUESTION = "What is the capital of France?"


def test_right_document_comes_first(client: Client) -> None:
    ranked = client.rerank(QUESTION, DOCUMENTS)
    assert [document.index for document in ranked][:2] == [1, 0]
    assert sorted(document.index for document in ranked) == [0, 1, 2, 3]
    assert all(0 <= document.score <= 1 for document in ranked)
    assert all(document.document == DOCUMENTS[document.index] for document in ranked)
    assert [document.score for document in ranked] == sorted((d.score for d in ranked), reverse=True)


def test_top_n_limits_the_ranking(client: Client) -> None:
    assert [document.index for document in client.rerank(QUESTION, DOCUMENTS, top_n=1)] == [1]
    assert len(client.rerank(QUESTION, DOCUMENTS, top_n=100)) == 4


@pytest.mark.parametrize("count", [1, 2, 333, 1000])
def test_every_document_gets_a_score(client: Client, count: int) -> None:
    ranked = client.rerank("number 7", [f"this is number {index}" for index in range(count)])
    assert sorted(document.index for document in ranked) == list(range(count))


def test_score_depends_on_neither_order_nor_other_documents(client: Client) -> None:
    scores = {document.document: document.score for document in client.rerank(QUESTION, DOCUMENTS)}
    backwards = client.rerank(QUESTION, DOCUMENTS[::-1])
    assert {document.document: document.score for document in backwards} == pytest.approx(scores, abs=1e-4)
    alone = client.rerank(QUESTION, DOCUMENTS[1:2])
    assert alone[0].score == pytest.approx(scores[DOCUMENTS[1]], abs=1e-4)


def test_concurrent_callers_get_their_own_ranking(client: Client) -> None:
    def best(number: int) -> str:
        documents = [f"the colour of item {other} is blue" for other in range(number, number + 3)]
        return client.rerank(f"the colour of item {number}", documents, top_n=1)[0].document

    with ThreadPoolExecutor(16) as pool:
        winners = list(pool.map(best, range(16)))
    assert winners == [best(number) for number in range(16)]


@pytest.mark.parametrize(
    ("query", "documents", "tensor"),
    [
        pytest.param("", ["a"], "QUERY", id="empty-query"),
        pytest.param("q" * 10_001, ["a"], "QUERY", id="long-query"),
        pytest.param("q", [], "DOCUMENTS", id="no-documents"),
        pytest.param("q", ["a"] * 1001, "DOCUMENTS", id="too-many-documents"),
        pytest.param("q", ["a", "b" * 1_000_001], r"DOCUMENTS\[1\]", id="huge-document"),
    ],
)
def test_invalid_input_names_the_tensor(client: Client, query: str, documents: list[str], tensor: str) -> None:
    with pytest.raises(InvalidInput, match=tensor) as caught:
        client.rerank(query, documents)
    assert len(str(caught.value)) < 300


def test_metrics_count_requests_and_tokens(server: Server) -> None:
    names = {
        "pairs": "genserve_pairs_total",
        "tokens": "genserve_tokens_total",
        "padding": "genserve_padding_tokens_total",
        "hits": "genserve_score_cache_hits_total",
        "in forwards": "genserve_batch_tokens_sum",
    }

    def counts() -> dict[str, float]:
        return {key: server.metric("rerank", name) for key, name in names.items()}

    time.sleep(2 * HEARTBEAT_S + 0.5)  # until what other tests have done is told
    before = counts()
    queued = server.metric("rerank", "genserve_queue_seconds_total")
    worked = server.metric("rerank", "genserve_stage_seconds_total", stage="forward")
    with Client(server.grpc) as client:
        client.rerank(QUESTION, DOCUMENTS)
    wait_until(lambda: counts()["pairs"] > before["pairs"], what="the counts")
    counted = {key: value - before[key] for key, value in counts().items()}
    tokens = counted["tokens"]
    assert 30 < tokens < 60  # of a question and three short sentences
    assert counted == {"pairs": 4.0, "tokens": tokens, "padding": 0.0, "hits": 0.0, "in forwards": tokens}
    assert server.metric("rerank", "genserve_queue_seconds_total") > queued
    assert server.metric("rerank", "genserve_stage_seconds_total", stage="forward") > worked
