"""Hostile bodies of requests to the gateway: each gets a short 4xx, in the dialect of its path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_servers import FakeServer
from gateway_app import RERANK, complete, with_gateway

from genserve.gateway import app

JSON = {"content-type": "application/json"}
POSTS: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "x"},
    "/v1/images/generations": {"prompt": "x"},
    "/v1/rerank": RERANK,
    "/v2/rerank": RERANK,
    "/rerank": {"query": "q", "texts": ["a"]},
    "/score": {"text_1": "q", "text_2": ["a"]},
    "/v1/ranking": {"query": {"text": "q"}, "passages": [{"text": "a"}]},
    "/v1/tasks": RERANK,
}
"""A valid body of each route."""
MANY = 20_000


def answer(path: str, body: bytes, **settings: Any) -> tuple[int, str]:
    server = FakeServer()
    server.always = complete
    found = with_gateway(lambda http: http.post(path, content=body, headers=JSON), server, **settings)
    assert found.status_code < 400 or found.headers["x-request-id"] in found.text
    return found.status_code, found.text


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"prompt": "\xff"}', "it is not JSON: invalid unicode code point"),
        (b'{"prompt": "\xed\xa0\x80"}', "it is not JSON: invalid unicode code point"),
        ('{"prompt": "x"}'.encode("utf-16"), "it is not JSON: expected value at line 1 column 1"),
        (b'{"prompt": "\\ud800"}', "it is not JSON: unexpected end of hex escape"),
        (b'{"\\udfff": 1}', "it is not JSON: lone leading surrogate"),
        (b'{"x": NaN}', "it is not JSON: expected value at line 1 column 7"),
        (b'{"x": -Infinity}', "it is not JSON: invalid number"),
        (b'{"x": ' + b"1" * 5_000 + b"}", "it is not JSON: number out of range"),
        (b"[" * 100_000, "it is not JSON: recursion limit exceeded"),
        (b'{"x":' * 100_000, "it is not JSON: recursion limit exceeded"),
        (b"{", "it is not JSON: EOF while parsing an object"),
        (b'{"prompt": "x"} {}', "it is not JSON: trailing characters"),
        (json.dumps({f"x{number}": 1 for number in range(1_001)}).encode(), "it has 1,001 fields"),
    ],
)
def test_body_that_is_not_json_is_refused(path: str, body: bytes, reason: str) -> None:
    status, text = answer(path, body)
    assert status in {400, 422}
    assert f"the request's body is not usable: {reason}" in text


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("start", [b"\xef\xbb\xbf{", b'{"more": "\\ud83d\\ude00", ', b'{"more": "\\\\ud800", '])
def test_byte_order_mark_and_whole_pairs_are_accepted(path: str, start: bytes) -> None:
    status, text = answer(path, start + json.dumps(POSTS[path]).encode()[1:])
    assert "is not usable" not in text
    assert status == (404 if path == "/v1/tasks" else 200), "there are no tasks without a database"


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("items", ["1", "{}", "[]", "null"])
def test_long_list_of_wrong_items_costs_few_messages(
    path: str, items: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A body of 8 MiB could otherwise cost gigabytes and minutes."""
    counts: list[int] = []

    async def counted(request: Any, error: Any) -> Any:
        counts.append(len(error.errors()))
        return await invalid(request, error)

    invalid = app._invalid
    monkeypatch.setattr(app, "_invalid", counted)
    long = "[" + ",".join([items] * MANY) + "]"
    for field in {*POSTS[path], "texts", "text_1", "text_2", "queries", "items", "documents", "lora", "rank_fields"}:
        fields = {**{name: json.dumps(value) for name, value in POSTS[path].items()}, field: long}
        body = "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}"
        status, text = answer(path, body.encode(), tasks=f"sqlite:///{tmp_path / 'tasks.db'}")
        assert status < 500
        assert len(text) < 10_000
    assert counts, "at least one of them is wrong"
    assert max(counts) <= 5_000


@pytest.mark.parametrize("path", ["/v2/rerank", "/rerank"])
@pytest.mark.parametrize(
    "value", ["1e999", "[-1e999]", "1" * 4_000, "[" * 100 + "]" * 100, "[" * 190 + "]" * 190, "{}"]
)
def test_whatever_a_document_has_is_returned_as_json(path: str, value: str) -> None:
    document = f'{{"text": "a", "x": {value}, "y": "\\u0000\\ud83d\\ude00"}}'
    status, text = answer(path, f'{{"query": "q", "documents": [{document}], "return_documents": true}}'.encode())
    assert status == 200
    returned = json.loads(text)["results"][0]["document"]
    assert (returned["text"], returned["y"]) == ("a", "\0\U0001f600")
