"""Concurrent rerank requests: scores do not depend on the batch, and small requests do not wait for large ones."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import PROTOCOLS, Server
from rerank_requests import Request, draw_request, same_ranking

from genserve import Client, RankedDocument

COUNT = 200
CALLERS = 64


def draw_requests() -> list[Request]:
    rng = random.Random(5)
    return [draw_request(rng, documents=8, words=120) for _ in range(COUNT)]


REQUESTS = draw_requests()


@pytest.fixture(scope="module")
def alone(running_server: Server) -> list[list[RankedDocument]]:
    with Client(running_server.grpc, timeout=120) as client:
        return [client.rerank(*request) for request in REQUESTS]


@pytest.fixture(params=PROTOCOLS)
def client(request: pytest.FixtureRequest, server: Server) -> Iterator[Client]:
    with Client(server.url(request.param), timeout=120) as client:
        yield client


def test_concurrent_requests_do_not_change_a_ranking(alone: list[list[RankedDocument]], client: Client) -> None:
    order = random.Random().sample(range(COUNT), COUNT)
    with ThreadPoolExecutor(CALLERS) as pool:
        futures = {index: pool.submit(client.rerank, *REQUESTS[index]) for index in order}
    together = [futures[index].result() for index in range(COUNT)]
    different = [index for index, pair in enumerate(zip(alone, together, strict=True)) if not same_ranking(*pair)]
    assert not different


def test_small_requests_overtake_a_large_one(client: Client) -> None:
    rng = random.Random(6)
    documents = [f"{index} {' '.join(rng.choices(('one', 'two', 'three', 'four'), k=100))}" for index in range(600)]
    with ThreadPoolExecutor(8) as pool:
        large = pool.submit(client.rerank, "three", documents)
        time.sleep(1.0)
        small = [pool.submit(client.rerank, f"number {each}", [f"number {each}", "another"]) for each in range(7)]
        winners = [future.result()[0].document for future in small]
        assert not large.done()
        assert winners == [f"number {each}" for each in range(7)]
        assert len(large.result()) == len(documents)


def test_windows_score_text_beyond_the_model_length(client: Client) -> None:
    filler = "Water boils at a hundred degrees, and the panda eats bamboo. " * 100
    documents = [f"{filler} Paris is the capital of France.", "Berlin is the capital of Germany."]
    question = "What is the capital of France?"
    cut = {document.index: document.score for document in client.rerank(question, documents)}
    read = {document.index: document.score for document in client.rerank(question, documents, windows=16)}
    assert read[1] == pytest.approx(cut[1], abs=1e-4)
    assert read[0] > cut[0] + 0.05
