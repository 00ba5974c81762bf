"""Progress events of images, and their places in the queue."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import httpx
import numpy as np
import pytest
from fake_servers import FakeServer, image
from gateway_app import gateway

from genserve import InvalidInput
from genserve.gateway import line
from genserve.protocol import Call, Outputs

IMAGES = "/v1/images/generations"
INFO = b'{"height": 64, "width": 48, "steps": 4, "guidance": 3.5}'
PREVIEW = b"a small jpeg"


class Board(FakeServer):
    """Server with a board of tasks that the test writes. Images are finished when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.board: dict[str, dict[str, Any]] = {}
        self.looks: Counter[str] = Counter()
        self.finished = asyncio.Event()
        self.always = self.paint

    async def paint(self, call: Call) -> Outputs:
        await self.finished.wait()
        return {**image(call), "INFO": np.array([[INFO]], dtype=np.object_)}

    def put(self, task_id: str, state: str, **values: Any) -> None:
        row = {"task_id": task_id, "state": state, "step": 0, "steps": 0, "model": "flux", "instance": "flux_0_0"}
        self.board[task_id] = {**row, "error": None, "arrived": 1.0, "changed": 1.0, **values}

    async def infer(self, call: Call, timeout_s: float) -> Outputs:
        if call.model != "tasks":
            return await super().infer(call, timeout_s)
        action, task_id = (call.inputs[name].item().decode() for name in ("ACTION", "TASK_ID"))
        if action == "status":
            self.looks[task_id] += 1
        unknown = {"task_id": task_id, "state": "unknown", "step": 0, "steps": 0, "instance": None}
        answer: Any = list(self.board.values()) if action == "list" else self.board.get(task_id, unknown)
        preview = PREVIEW if answer and action == "status" and answer["state"] == "running" else b""
        return {
            "TASK": np.array([json.dumps(answer).encode()], dtype=np.object_),
            "PREVIEW": np.array([preview], dtype=np.object_),
        }


@pytest.fixture(autouse=True)
def listed_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "LISTED_S", 0.0)


class Events:
    """Events of one request for an image with progress."""

    def __init__(self, http: httpx.AsyncClient, task_id: str, **body: Any) -> None:
        body = {"prompt": task_id, "stream": True, "stream_progress": True, **body}
        self.request = asyncio.ensure_future(http.post(IMAGES, json=body, headers={"x-request-id": task_id}))

    async def all(self) -> list[dict[str, Any]]:
        answer = await self.request
        assert answer.status_code == 200, answer.text
        return [json.loads(each[6:]) for each in answer.text.splitlines() if each.startswith("data: ")]


async def until_sent(server: Board, prompt: str) -> None:
    """Wait until the gateway has sent the request for an image."""
    while prompt not in [call.inputs["PROMPT"].item().decode() for call in server.calls]:
        await asyncio.sleep(0.01)


async def until_seen(server: Board, task_id: str) -> None:
    """Wait until the gateway has looked at a task and has dealt with what it saw: it looks again."""
    wanted = server.looks[task_id] + 2
    while server.looks[task_id] < wanted:
        await asyncio.sleep(0.01)


def test_events_show_place_step_and_preview() -> None:
    async def run() -> list[dict[str, Any]]:
        server = Board()
        async with gateway(server) as http:
            server.put("other-1", "waiting", arrived=1.0)
            server.put("other-2", "waiting", arrived=2.0)
            server.put("other-3", "running", step=1, steps=9)
            events = Events(http, "mine")
            await until_seen(server, "mine")
            server.put("mine", "waiting", arrived=1.5)
            await until_seen(server, "mine")
            server.put("mine", "running", step=3, steps=4)
            await until_seen(server, "mine")
            server.finished.set()
            return await events.all()

    *progress, completed = asyncio.run(run())
    assert completed["type"] == "image_generation.completed"
    assert {event["type"] for event in progress} == {"image_generation.progress"}
    shown = [(event["state"], event["queue_position"], event["step"], event["preview_b64"]) for event in progress]
    assert shown == [("waiting", 3, 0, ""), ("waiting", 2, 0, ""), ("running", None, 3, "YSBzbWFsbCBqcGVn")]


def test_place_counts_the_gateways_own_requests_by_priority() -> None:
    async def run() -> dict[str, int]:
        server = Board()
        places = {}
        async with gateway(server) as http:
            waiting = [
                http.post(IMAGES, json={"prompt": "first", "priority": "low"}),
                http.post("/generate", json={"prompt": "second", "priority": 0}),
            ]
            others = [asyncio.ensure_future(each) for each in waiting]
            await until_sent(server, "first")
            await until_sent(server, "second")
            asked = {name: Events(http, name, priority=name) for name in ("low", "normal", "high")}
            for name in asked:
                await until_sent(server, name)
            for name in asked:
                await until_seen(server, name)
            server.finished.set()
            for name, events in asked.items():
                *progress, _ = await events.all()
                # Places only grow until all have been seen, and shrink as the requests end.
                places[name] = max(event["queue_position"] for event in progress)
            await asyncio.gather(*others)
        return places

    # Before "high": the second. Before "normal": also "high". Before "low": also "normal" and the first.
    assert asyncio.run(run()) == {"high": 2, "normal": 3, "low": 5}


def test_finished_requests_leave_the_line() -> None:
    async def run() -> int:
        server = Board()
        async with gateway(server) as http:
            server.finished.set()
            await http.post(IMAGES, json={"prompt": "done"})
            await Events(http, "done-too").all()
            server.finished.clear()
            events = Events(http, "mine")
            await until_seen(server, "mine")
            server.finished.set()
            return int((await events.all())[0]["queue_position"])

    assert asyncio.run(run()) == 1


def test_refused_image_gets_a_status_of_its_own() -> None:
    async def run() -> httpx.Response:
        server = Board()
        server.always = InvalidInput("STEPS is 0; allowed: 1 to 100")
        async with gateway(server) as http:
            return await Events(http, "mine").request

    answer = asyncio.run(run())
    assert answer.status_code == 400
    assert "STEPS is 0" in answer.json()["error"]["message"]
