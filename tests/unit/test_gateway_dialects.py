"""Names of models, pairs of texts, limits and headers of the gateway, before fake servers."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fake_servers import FakeServer, scores
from gateway_app import with_gateway

from genserve import DeadlineExceeded, QueueFull, ServerError
from genserve.gateway import names
from genserve.gateway.errors import Failure
from genserve.gateway.names import Model
from genserve.gateway.rerank import SCORED_AT_ONCE
from genserve.protocol import Call, Outputs


def post(server: FakeServer, path: str, body: dict[str, Any], **settings: Any) -> httpx.Response:
    async def ask(http: httpx.AsyncClient) -> httpx.Response:
        return await http.post(path, json=body)

    return with_gateway(ask, server, **settings)


@pytest.mark.parametrize(
    ("given", "model"),
    [
        ("flux", "flux"),
        ("flux1-dev", "flux"),
        ("black-forest-labs/FLUX.1-schnell", "flux"),
        ("dall-e-3", "flux"),
        ("chatgpt-image-latest", "flux"),
        ("gpt-image-1", "flux"),
        ("rerank", "rerank"),
        ("rerank-multilingual-v3.0", "rerank"),
        ("jina-reranker-v2-base-multilingual", "rerank"),
        ("BAAI/bge-reranker-v2-m3", "rerank"),
        ("Qwen/Qwen3-Reranker-4B", "rerank"),
        ("ms-marco", "rerank"),
        ("house-style", "flux"),
    ],
)
def test_name_is_that_of_one_model(given: str, model: Model) -> None:
    aliases: dict[str, Model] = {"ms-marco": "rerank", "house-style": "flux"}
    other: Model = "rerank" if model == "flux" else "flux"
    assert names.checked(given, model, aliases) == given
    with pytest.raises(Failure) as caught:
        names.checked(given, other, aliases)
    assert (caught.value.status, caught.value.kind, caught.value.parameter) == (404, "UnknownModel", "model")


@pytest.mark.parametrize("given", [None, ""])
def test_request_without_a_name_is_for_the_model_of_its_path(given: str | None) -> None:
    assert names.checked(given, "flux", {}) == "flux"


def test_alias_decides_before_the_built_in_names() -> None:
    with pytest.raises(Failure):
        names.checked("flux-reranker", "flux", {"flux-reranker": "rerank"})


def test_long_name_is_cut_in_the_message() -> None:
    with pytest.raises(Failure) as caught:
        names.checked("x" * 10_000, "flux", {})
    assert len(caught.value.message) < 200


def test_pairs_with_equal_queries_are_one_request() -> None:
    server = FakeServer()
    body = {"text_1": ["a", "b", "a", "b"], "text_2": ["1", "22", "333", "4444"]}
    answer = post(server, "/score", body)
    assert [each["score"] for each in answer.json()["data"]] == [1.0, 2.0, 3.0, 4.0]
    assert sorted(tuple(call.inputs["DOCUMENTS"][0]) for call in server.calls) == [(b"1", b"333"), (b"22", b"4444")]
    assert len({call.request_id for call in server.calls}) == 2


def test_pairs_with_different_queries_are_a_few_requests_at_once() -> None:
    server = FakeServer()

    async def later(call: Call) -> Outputs:
        await asyncio.sleep(0.01)
        return scores(call)

    server.always = later
    texts = [f"{number}" for number in range(50)]
    assert len(post(server, "/score", {"text_1": texts, "text_2": texts}).json()["data"]) == 50
    assert (len(server.calls), server.most_running) == (50, SCORED_AT_ONCE)


def test_failed_pair_ends_the_others() -> None:
    server = FakeServer()

    async def fail_second(call: Call) -> Outputs:
        if call.inputs["QUERY"].item() == b"b":
            raise ServerError("broken")
        return await asyncio.Event().wait()  # type: ignore[return-value]

    server.always = fail_second
    assert post(server, "/score", {"text_1": ["a", "b"], "text_2": ["c", "d"]}).status_code == 500
    assert server.running == 0


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (QueueFull("full"), {"retry-after": "1"}),
        (DeadlineExceeded("late"), {"x-should-retry": "false"}),
        (ServerError("broken"), {"x-should-retry": "false"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_headers_say_whether_to_retry(error: Exception, headers: dict[str, str]) -> None:
    server = FakeServer()
    server.always = error
    answer = post(server, "/v2/rerank", {"query": "q", "documents": ["a"]})
    told = {name: answer.headers[name] for name in ("retry-after", "x-should-retry") if name in answer.headers}
    assert told == headers


def test_unknown_limits_are_null() -> None:
    health = with_gateway(lambda http: http.get("/health"), FakeServer())
    assert health.status_code == 200
    assert health.json() == {
        "status": "healthy",
        "max_num_seqs": None,
        "tensor_parallel_size": None,
        "max_workers": None,
    }


def test_waiting_requests_of_the_gateway_count_as_the_queue() -> None:
    server = FakeServer()
    server.hung = True

    async def ask(http: httpx.AsyncClient) -> int:
        body = {"prompt": "x", "n": 3}
        asked = asyncio.ensure_future(http.post("/v1/images/generations", json=body))
        while server.running < 3:
            await asyncio.sleep(0.001)
        size = (await http.get("/status")).json()["concurrent_manager"]["global_queue_size"]
        asked.cancel()
        return int(size)

    assert with_gateway(ask, server) == 3
