"""The gateway's routes and errors, before fake servers."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import pytest
from fake_servers import FakeServer, image, scores
from fastapi import Request

from genserve import AsyncClient, DeadlineExceeded, InvalidInput, OutOfMemory, QueueFull, ServerError, ServerUnavailable
from genserve.gateway.app import create_app
from genserve.gateway.context import Context
from genserve.gateway.errors import Failure
from genserve.gateway.image_events import REFUSAL_S, Partial
from genserve.gateway.settings import GatewaySettings
from genserve.protocol import Call, Outputs
from genserve.types import TaskStatus

Ask = Callable[[httpx.AsyncClient], Coroutine[Any, Any, httpx.Response]]


async def painted(call: Call) -> Outputs:
    """Answer with an INFO as complete as the server's."""
    outputs = image(call)
    outputs["INFO"][0, 0] = (
        b'{"height": 64, "width": 48, "steps": 4, "guidance": 3.5, "gpu_id": 0, "device": "cpu", "elapsed_time": 0.5}'
    )
    return outputs


def ask(server: FakeServer, method: str, path: str, **options: Any) -> httpx.Response:
    """Send one request to a gateway in front of the server."""

    async def run() -> httpx.Response:
        app = create_app(GatewaySettings(max_body_bytes=4096), AsyncClient(transport=[server]))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://gateway") as http,
        ):
            return await http.request(method, path, **options)

    return asyncio.run(run())


RERANK = {"query": "q", "documents": ["a", "bcd", "ef"]}


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_documents_are_ranked(path: str) -> None:
    answer = ask(FakeServer(), "POST", path, json={**RERANK, "top_n": 2, "return_documents": True})
    assert answer.status_code == 200
    assert answer.json()["results"] == [
        {"index": 1, "relevance_score": 3.0, "document": {"text": "bcd"}},
        {"index": 2, "relevance_score": 2.0, "document": {"text": "ef"}},
    ]


def test_texts_are_answered_with_a_list() -> None:
    answer = ask(FakeServer(), "POST", "/rerank", json={"query": "q", "texts": ["a", "bc"], "return_text": True})
    assert answer.json() == [{"index": 1, "score": 2.0, "text": "bc"}, {"index": 0, "score": 1.0, "text": "a"}]


@pytest.mark.parametrize(
    "body",
    [
        {"text_1": "q", "text_2": ["a", "bc"]},
        {"queries": ["q", "r"], "documents": ["a", "bc"]},
        {"queries": "q", "items": ["a", "bc"]},
    ],
    ids=["text", "pairs", "items"],
)
def test_pairs_are_scored(body: dict[str, Any]) -> None:
    answer = ask(FakeServer(), "POST", "/score", json=body).json()
    assert [(each["index"], each["score"]) for each in answer["data"]] == [(0, 1.0), (1, 2.0)]


def test_passages_are_ranked_by_log_odds() -> None:
    server = FakeServer()

    async def halves(call: Call) -> Outputs:
        outputs = scores(call)
        outputs["SCORES"] /= 4
        return outputs

    server.always = halves
    body = {"query": {"text": "q"}, "passages": [{"text": "aa"}, {"text": "bbb"}, {"text": "cccc"}, {"text": ""}]}
    rankings = ask(server, "POST", "/v1/ranking", json=body).json()["rankings"]
    assert [each["index"] for each in rankings] == [2, 1, 0, 3]
    assert rankings[2]["logit"] == 0.0
    assert 15 < rankings[0]["logit"] < 17
    assert rankings[1]["logit"] == pytest.approx(1.0986, abs=1e-4)


def test_documents_may_be_objects() -> None:
    documents = [{"text": "abc", "id": 1}, {"title": "t", "body": "b"}]
    server = FakeServer()
    answer = ask(server, "POST", "/v2/rerank", json={"query": "q", "documents": documents, "return_documents": True})
    assert answer.json()["results"][0]["document"] == {"title": "t", "body": "b"}
    assert list(server.calls[0].inputs["DOCUMENTS"][0]) == [b"abc", b"title: t\nbody: b"]


def test_one_image_by_the_own_route() -> None:
    server = FakeServer()
    server.always = painted
    body = {"prompt": "x", "model_id": "flux1-dev", "num_inference_steps": 4, "priority": 0, "cfg": 2, "seed": -1}
    answer = ask(server, "POST", "/generate", json=body, headers={"x-request-id": "mine"}).json()
    assert base64.b64decode(answer["image"]) == b"x"
    assert (answer["gpu_id"], answer["elapsed_time"], answer["task_id"]) == (0, 0.5, "mine")
    (call,) = server.calls
    assert (call.priority, call.request_id) == (1, "mine")
    assert call.inputs["GUIDANCE"].item() == 2.0


ADAPTERS = [
    ("neon", [("neon", 1.0)]),
    ({"name": "neon", "weight": 0.5}, [("neon", 0.5)]),
    ({"neon": 0.5, "other": 1}, [("neon", 0.5), ("other", 1.0)]),
    (["neon", {"name": "other", "weight": 0.25}], [("neon", 1.0), ("other", 0.25)]),
]


@pytest.mark.parametrize("path", ["/generate", "/v1/images/generations"])
@pytest.mark.parametrize(("given", "sent"), ADAPTERS, ids=str)
def test_adapters_and_cache_reach_the_server(path: str, given: Any, sent: list[tuple[str, float]]) -> None:
    server = FakeServer()
    server.always = painted
    assert ask(server, "POST", path, json={"prompt": "x", "lora": given, "cache": 0.25}).status_code == 200
    (call,) = server.calls
    assert json.loads(call.inputs["LORA"].item()) == [{"name": name, "weight": weight} for name, weight in sent]
    assert call.inputs["CACHE"].item() == 0.25


@pytest.mark.parametrize("path", ["/generate", "/v1/images/generations"])
@pytest.mark.parametrize("given", [{}, {"lora": []}, {"lora": {}}, {"lora": None, "cache": None}], ids=str)
def test_neither_adapters_nor_cache_send_no_tensor(path: str, given: dict[str, Any]) -> None:
    server = FakeServer()
    server.always = painted
    assert ask(server, "POST", path, json={"prompt": "x", **given}).status_code == 200
    assert not {"LORA", "CACHE"} & server.calls[0].inputs.keys()


@pytest.mark.parametrize("path", ["/generate", "/v1/images/generations"])
@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"lora": 5}, "lora: Input should be a valid list"),
        ({"lora": ""}, "lora.0.name: String should have at least 1 character"),
        ({"lora": [["neon", 0.5]]}, "lora.0"),
        ({"lora": [{"weight": 1.0}]}, "lora.0.name: Field required"),
        ({"lora": {"neon": "0.5"}}, "lora.0.weight: Input should be a valid number"),
        ({"lora": {"neon": True}}, "lora.0.weight: Input should be a valid number"),
        ({"lora": [{"name": "neon", "scale": 1.0}]}, "lora.0.scale: Extra inputs are not permitted"),
        ({"lora": ["neon"] * 9}, "lora: List should have at most 8 items"),
        ({"cache": "0.1"}, "cache: Input should be a valid number"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_unusable_adapters_are_refused(path: str, given: dict[str, Any], part: str) -> None:
    server = FakeServer()
    answer = ask(server, "POST", path, json={"prompt": "x", **given})
    assert answer.status_code == 400
    assert part in answer.text
    assert server.calls == []


def test_images_have_seeds_that_follow_each_other() -> None:
    server = FakeServer()
    server.always = painted
    body = {"prompt": "x", "n": 3, "size": "48x64", "seed": 7, "quality": "hd", "style": "vivid"}
    answer = ask(server, "POST", "/v1/images/generations", json=body)
    assert [each["seed"] for each in answer.json()["data"]] == [7, 8, 9]
    assert answer.json()["size"] == "48x64"
    assert answer.headers["x-ignored-fields"] == "quality, style"
    assert {(call.inputs["WIDTH"].item(), call.inputs["HEIGHT"].item()) for call in server.calls} == {(48, 64)}
    assert len({call.request_id for call in server.calls}) == 3


def test_stream_ends_with_each_image() -> None:
    server = FakeServer()
    server.always = painted
    body = {"prompt": "x", "n": 2, "stream": True}
    answer = ask(server, "POST", "/v1/images/generations", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.count("event: image_generation.completed") == 2


def test_stream_that_fails_at_once_has_the_status_of_its_error() -> None:
    server = FakeServer()
    server.always = ServerError("broken")
    answer = ask(server, "POST", "/v1/images/generations", json={"prompt": "x", "stream": True, "n": 2})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "broken"
    assert server.running == 0


def test_stream_that_fails_later_tells_its_error() -> None:
    server = FakeServer()

    async def fail_later(call: Call) -> Outputs:
        await asyncio.sleep(REFUSAL_S + 0.2)
        raise ServerError("broken")

    server.always = fail_later
    answer = ask(server, "POST", "/v1/images/generations", json={"prompt": "x", "stream": True})
    assert answer.status_code == 200
    assert answer.text.count("event: error") == 1
    assert "broken" in answer.text


def test_failed_image_ends_the_others() -> None:
    server = FakeServer()

    async def fail_first(call: Call) -> Outputs:
        if call.request_id == "mine":
            raise ServerError("broken")
        return await asyncio.Event().wait()  # type: ignore[return-value]

    server.always = fail_first
    body = {"prompt": "x", "n": 3}
    answer = ask(server, "POST", "/v1/images/generations", json=body, headers={"x-request-id": "mine"})
    assert answer.status_code == 500
    assert server.running == 0


def test_previews_are_spread_over_the_steps() -> None:
    partial = Partial(3)
    sent = [
        step
        for step in range(21)
        if partial.due(TaskStatus("t", "running", step, 20, preview=b"jpeg" if step > 2 else b""))
    ]
    assert sent == [5, 10, 15]
    assert not Partial(0).due(TaskStatus("t", "running", 20, 20, preview=b"jpeg"))
    assert not Partial(3).due(TaskStatus("t", "done", 20, 20, preview=b"jpeg"))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidInput("STEPS is 0"), 400),
        (QueueFull("full"), 503),
        (QueueFull("slow down", retry_after=7.2), 503),
        (DeadlineExceeded("late"), 503),
        (OutOfMemory("large"), 503),
        (ServerUnavailable("down"), 503),
        (ServerError("broken"), 500),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_become_statuses(error: Exception, status: int) -> None:
    server = FakeServer()
    server.always = error
    answer = ask(server, "POST", "/generate", json={"prompt": "x"})
    assert answer.status_code == status
    assert answer.json() == {
        "error": type(error).__name__,
        "message": str(error),
        "request_id": answer.headers["x-request-id"],
    }
    waits = {QueueFull: "8" if getattr(error, "retry_after", None) else "1", ServerUnavailable: "1"}
    assert answer.headers.get("retry-after") == waits.get(type(error))


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/generate", {"error", "message", "request_id"}),
        ("/v1/images/generations", {"error", "request_id"}),
        ("/v1/rerank", {"id", "message", "detail"}),
        ("/v2/rerank", {"id", "message", "detail"}),
        ("/rerank", {"error", "error_type", "detail", "request_id"}),
        ("/score", {"error", "request_id"}),
        ("/v1/ranking", {"object", "message", "type", "detail"}),
    ],
)
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"null", b'{"query": 1, "prompt": 1}', b"\xff\xfe", b"[" * 3000, b"x" * 5000],
    ids=["empty", "list", "half", "null", "types", "bytes", "deep", "large"],
)
def test_unusable_bodies_are_refused_in_each_dialect(path: str, shape: set[str], content: bytes) -> None:
    server = FakeServer()
    answer = ask(server, "POST", path, content=content, headers={"content-type": "application/json"})
    unreadable = 422 if "rank" in path else 400
    assert answer.status_code == (413 if len(content) > 4096 else unreadable)
    assert answer.json().keys() == shape
    assert server.calls == []


def test_unannounced_large_body_is_refused() -> None:
    async def chunks() -> Any:
        for _ in range(100):
            yield b"x" * 100

    answer = ask(FakeServer(), "POST", "/generate", content=chunks(), headers={"content-type": "application/json"})
    assert answer.status_code == 413


@pytest.mark.parametrize(
    "given", ["mine-1", "", "x" * 129, "a b", "é"], ids=["good", "empty", "long", "space", "other"]
)
def test_every_answer_has_a_request_id(given: str) -> None:
    answer = ask(FakeServer(), "GET", "/nothing", headers={"x-request-id": given.encode()})
    assert answer.status_code == 404
    assert (answer.headers["x-request-id"] == given) is (given == "mine-1")
    assert len(answer.headers["x-request-id"]) >= 6


def test_health_follows_the_servers() -> None:
    server = FakeServer()
    assert ask(server, "GET", "/health").status_code == 200
    server.is_ready = ServerUnavailable("down")
    assert ask(server, "GET", "/health").status_code == 503


def test_work_ends_when_the_caller_hangs_up() -> None:
    server = FakeServer()
    server.hung = True
    app = create_app(GatewaySettings(), AsyncClient(transport=[server]))

    async def run() -> None:
        hung_up = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await hung_up.wait()
            return {"type": "http.disconnect"}

        request = Request({"type": "http", "app": app, "state": {"request_id": "mine"}}, receive)
        context = Context(request)
        work = asyncio.ensure_future(context.run(context.client.generate("x")))
        while not server.running:
            await asyncio.sleep(0.001)
        hung_up.set()
        with pytest.raises(Failure) as caught:
            await work
        assert caught.value.status == 499
        assert server.running == 0

    asyncio.run(run())
