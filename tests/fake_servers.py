"""Asynchronous fake transports, whose answers the test controls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from genserve.protocol import Call, Outputs

Answer = Callable[[Call], Awaitable[Outputs]]


def scores(call: Call) -> Outputs:
    """Return the answer to a rerank request: the length of each document."""
    values = [[float(len(document)) for document in call.inputs["DOCUMENTS"][0]]]
    return {"SCORES": np.array(values, dtype=np.float32), "INFO": np.array([[b"{}"]], dtype=np.object_)}


def image(call: Call) -> Outputs:
    """Return the answer to a flux request: the prompt as the image's bytes."""
    info = json.dumps({"steps": 4, "prompt": call.inputs["PROMPT"].item().decode()})
    return {
        "IMAGE": call.inputs["PROMPT"],
        "SEED": call.inputs["SEED"],
        "INFO": np.array([[info.encode()]], dtype=np.object_),
    }


def task(task_id: str, state: str = "unknown", **values: Any) -> Outputs:
    """Return the answer of the tasks model."""
    text = json.dumps({"task_id": task_id, "state": state, "step": 0, "steps": 0, **values})
    return {
        "TASK": np.array([text.encode()], dtype=np.object_),
        "PREVIEW": np.array([b""], dtype=np.object_),
    }


class FakeServer:
    """Server that answers at once, or as the test says."""

    def __init__(self, url: str = "fake") -> None:
        self.url = url
        self.calls: list[Call] = []
        self.tasks: list[tuple[str, str]] = []
        self.probes: list[str] = []
        self.script: list[Exception | Answer] = []
        self.always: Exception | Answer | None = None
        self.is_ready: bool | Exception = True
        self.is_live: bool | Exception = True
        self.hung = False
        self.running = 0
        self.most_running = 0
        self.closed = 0

    async def infer(self, call: Call, timeout_s: float) -> Outputs:
        if call.model == "tasks":
            action, task_id = (call.inputs[name].item().decode() for name in ("ACTION", "TASK_ID"))
            self.tasks.append((action, task_id))
            return task(task_id)
        self.calls.append(call)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if self.hung:
                await asyncio.Event().wait()
            answer = self.script.pop(0) if self.script else self.always
            if isinstance(answer, Exception):
                raise answer
            if answer:
                return await answer(call)
            return image(call) if call.model == "flux" else scores(call)
        finally:
            self.running -= 1

    async def live(self) -> bool:
        self.probes.append("live")
        return _said(self.is_live)

    async def ready(self, model: str = "") -> bool:
        self.probes.append(model)
        return _said(self.is_ready)

    async def metadata(self) -> dict[str, Any]:
        return {"version": "2.55.0"}

    async def models(self) -> list[dict[str, Any]]:
        return []

    async def statistics(self) -> list[dict[str, Any]]:
        return []

    async def close(self) -> None:
        self.closed += 1


def after(seconds: float) -> Answer:
    """Return an answer that takes some seconds."""

    async def answer(call: Call) -> Outputs:
        await asyncio.sleep(seconds)
        return image(call) if call.model == "flux" else scores(call)

    return answer


def _said(value: bool | Exception) -> bool:
    if isinstance(value, Exception):
        raise value
    return value
