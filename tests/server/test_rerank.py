"""`rerank` through our client, over gRPC and HTTP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from genserve import Client, InvalidInput

DOCUMENTS = [
    "Berlin is the capital of Germany.",
    "Paris is the capital of France.",
    "A croissant is a pastry.",
    "",
]
QUESTION = "What is the capital of France?"


def test_the_right_document_comes_first(client: Client) -> None:
    ranked = client.rerank(QUESTION, DOCUMENTS)
    assert [document.index for document in ranked][:2] == [1, 0]
    assert sorted(document.index for document in ranked) == [0, 1, 2, 3]
    assert all(0 <= document.score <= 1 for document in ranked)
    assert all(document.document == DOCUMENTS[document.index] for document in ranked)
    assert [document.score for document in ranked] == sorted((d.score for d in ranked), reverse=True)


def test_top_n(client: Client) -> None:
    assert [document.index for document in client.rerank(QUESTION, DOCUMENTS, top_n=1)] == [1]
    assert len(client.rerank(QUESTION, DOCUMENTS, top_n=100)) == 4


@pytest.mark.parametrize("count", [1, 2, 333, 1000])
def test_every_document_gets_a_score(client: Client, count: int) -> None:
    ranked = client.rerank("number 7", [f"this is number {index}" for index in range(count)])
    assert sorted(document.index for document in ranked) == list(range(count))


def test_order_and_company_do_not_change_a_score(client: Client) -> None:
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
def test_bad_input_names_the_tensor(client: Client, query: str, documents: list[str], tensor: str) -> None:
    with pytest.raises(InvalidInput, match=tensor) as caught:
        client.rerank(query, documents)
    assert len(str(caught.value)) < 300
