"""Events of a durable task, for callers that follow it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from sse_starlette import ServerSentEvent

from genserve.gateway.database import StoreUnavailable
from genserve.gateway.durable import Tasks
from genserve.gateway.records import StoredTask, shown

POLL_S = 0.4
"""Seconds between two looks at a task."""


async def follow(tasks: Tasks, task: StoredTask, link: Callable[[str], str]) -> AsyncIterator[ServerSentEvent]:
    """Yield a task's present state, and then each change until it ends.

    Args:
        tasks: The tasks.
        task: The task to follow.
        link: Function that turns a path of the gateway into a URL.
    """
    said: dict[str, Any] = {}
    found: StoredTask | None = task
    while found:
        try:
            for kind, values in (await _news(tasks, found, link)).items():
                if said.get(kind) != values:
                    said[kind] = values
                    yield _event(kind, found, values)
            if found.is_finished:
                return
            await asyncio.sleep(POLL_S)
            found = await tasks.store.get(task.id, task.owner)
        except StoreUnavailable:
            await asyncio.sleep(POLL_S)


async def _news(tasks: Tasks, task: StoredTask, link: Callable[[str], str]) -> dict[str, dict[str, Any]]:
    """Return the values of the events that describe a task's present state, by their kinds."""
    if task.is_finished:
        return {task.state: shown(task, link, documents=True)}
    if task.state == "queued":
        return {"queued": {"position": await tasks.store.position(task)}}
    live = await tasks.runner.look(task) if task.kind == "image" else None
    view = shown(task, link, live=live)
    news = {"step": {name: view[name] for name in ("step", "steps", "progress", "attempts")}}
    if live and live.preview:
        news["preview"] = {"step": live.step, "b64_json": base64.b64encode(live.preview).decode()}
    return news


def _event(kind: str, task: StoredTask, values: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(json.dumps({"type": kind, "id": task.id, "state": task.state, **values}), event=kind)
