"""Records of durable tasks."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from genserve.protocol import PRIORITIES
from genserve.types import Priority, TaskStatus

Kind = Literal["image", "rerank"]
KINDS: tuple[Kind, ...] = ("image", "rerank")
State = Literal["queued", "running", "done", "failed", "cancelled"]
STATES: tuple[State, ...] = ("queued", "running", "done", "failed", "cancelled")
UNFINISHED: tuple[State, ...] = ("queued", "running")
AGING_S = 600.0
"""Seconds of waiting that count as one level of priority, so that a stream of urgent tasks delays no task forever."""


@dataclass(frozen=True)
class NewTask:
    """Task to be accepted.

    Attributes:
        kind: The client's verb.
        arguments: Its arguments, with the seed, as JSON can hold them.
        owner: Name of the caller's key; empty without keys.
        priority: Priority in the queue and on the server.
        timeout_s: Seconds until its deadline.
        webhook_url: Address that is told of its end.
        idempotency_key: Caller's key, under which the task is accepted once.
        fingerprint: Digest of the request, to tell another request under the same key.
        id: The task's id.
    """

    kind: Kind
    arguments: Mapping[str, Any]
    owner: str
    timeout_s: float
    fingerprint: str
    priority: Priority = "normal"
    webhook_url: str | None = None
    idempotency_key: str | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def handicap_s(self) -> float:
        """Seconds by which later tasks of the highest priority go first."""
        return AGING_S * (PRIORITIES[self.priority] - PRIORITIES["high"])


@dataclass(frozen=True)
class StoredTask:
    """Row of the table of tasks. Times are seconds since the epoch by the database's clock."""

    number: int
    id: str
    owner: str
    idempotency_key: str | None
    fingerprint: str
    kind: Kind
    priority: Priority
    rank: float
    arguments: dict[str, Any]
    state: State
    step: int
    steps: int
    attempts: int
    runner: str | None
    lease_until: float | None
    accepted: float
    deadline: float
    started: float | None
    ended: float | None
    expires: float | None
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    webhook_url: str | None
    webhook_state: str | None
    webhook_attempts: int
    webhook_next: float | None
    left_s: float
    """Seconds to the deadline when the row was read."""

    @classmethod
    def of(cls, row: Mapping[Any, Any]) -> StoredTask:
        """Return the task in a row with all columns and `left_s`."""
        texts = {name: row[name] and json.loads(row[name]) for name in ("arguments", "result", "error")}
        return cls(**{**cast("Mapping[str, Any]", row), **texts})

    @property
    def is_finished(self) -> bool:
        """True if the task is done, failed or cancelled."""
        return self.state not in UNFINISHED

    @property
    def attempt_id(self) -> str:
        """Id of the present attempt on its server. An attempt that was given up cannot be mistaken for it."""
        return f"{self.id}-{self.attempts}"

    @property
    def file(self) -> str | None:
        """Name of the image's file, None without one."""
        return (self.result or {}).get("file")


@dataclass(frozen=True)
class Outcome:
    """End of a task.

    Attributes:
        state: Its last state.
        result: Seed, info and file of an image, or info and ranking; None unless the task is done.
        error: Class and message; None if the task is done.
    """

    state: Literal["done", "failed", "cancelled"]
    result: Mapping[str, Any] | None = None
    error: Mapping[str, str] | None = None

    @classmethod
    def of(cls, state: Literal["failed", "cancelled"], kind: str, message: str) -> Outcome:
        """Return the end of a task without a result."""
        return cls(state, error={"class": kind, "message": message})


def fingerprint(request: Mapping[str, Any]) -> str:
    """Return the digest of a request, the same for every order of its fields."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def shown(
    task: StoredTask,
    link: Callable[[str], str],
    *,
    live: TaskStatus | None = None,
    position: int | None = None,
    documents: bool = False,
) -> dict[str, Any]:
    """Return a task as callers see it.

    Args:
        task: The task.
        link: Function that turns a path of the gateway into a URL.
        live: Its progress on its server, if that is newer.
        position: Its place in the queue, from 1.
        documents: Repeat the documents of a ranking.
    """
    step, steps = task.step, task.steps
    if live is not None and task.state == "running":
        step, steps = live.step, live.steps
    return {
        "id": task.id,
        "object": "task",
        "kind": task.kind,
        "state": task.state,
        "priority": task.priority,
        "position": position,
        "step": step,
        "steps": steps,
        "progress": 1.0 if task.state == "done" else min(1.0, step / steps) if steps else 0.0,
        "request": {name: value for name, value in task.arguments.items() if name != "documents"},
        "result": _result(task, link, documents=documents),
        "error": task.error,
        "attempts": task.attempts,
        "accepted_at": task.accepted,
        "started_at": task.started,
        "ended_at": task.ended,
        "expires_at": task.expires,
        "deadline_at": task.deadline,
        "webhook": _webhook(task),
    }


def _result(task: StoredTask, link: Callable[[str], str], *, documents: bool) -> dict[str, Any] | None:
    if task.result is None:
        return None
    if task.kind == "image":
        result = {name: task.result[name] for name in ("seed", "info")}
        return {**result, "url": link(f"/files/{task.file}")}
    ranking = [{"index": index, "score": score} for index, score in task.result["ranking"]]
    if documents:
        ranking = [{**each, "document": task.arguments["documents"][each["index"]]} for each in ranking]
    return {"ranking": ranking, "info": task.result["info"]}


def _webhook(task: StoredTask) -> dict[str, Any] | None:
    if task.webhook_url is None:
        return None
    return {"url": task.webhook_url, "state": task.webhook_state, "attempts": task.webhook_attempts}
