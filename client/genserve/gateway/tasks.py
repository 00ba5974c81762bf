"""Durable tasks: accepted at once, done later, whatever happens to the gateway and the servers."""

from __future__ import annotations

import base64
import re
from collections.abc import Awaitable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from sse_starlette import EventSourceResponse

from genserve.errors import GenServeError
from genserve.gateway.context import InContext
from genserve.gateway.errors import Failure
from genserve.gateway.json_body import StrictRoute
from genserve.gateway.records import State, StoredTask, shown
from genserve.gateway.store import KeyReused
from genserve.gateway.task_bodies import AnyTask
from genserve.gateway.task_events import follow

router = APIRouter(tags=["tasks"], route_class=StrictRoute)

PATH = "/v1/tasks"
PAGE = 20
LONGEST_PAGE = 100
ID = r"^[0-9a-f]{32}$"
"""Form of the tasks' ids; no other text reaches the database."""
PRINTABLE = r"^[\x20-\x7e]{1,255}$"
T = TypeVar("T")


class Caller:
    """Caller of a request for tasks, which sees only its own ones.

    Raises:
        Failure: The gateway keeps no tasks.
    """

    def __init__(self, request: Request, context: InContext) -> None:
        if context.durable.tasks is None:
            raise Failure(404, "NotFound", "this gateway keeps no tasks")
        self.context = context
        self.tasks = context.durable.tasks
        self.owner: str = getattr(request.state, "key_name", None) or ""

    async def answer(self, work: Awaitable[T]) -> T:
        """Return the store's answer.

        Raises:
            Failure: There is none.
        """
        try:
            return await work
        except KeyReused as error:
            raise Failure(422, "InvalidInput", str(error), parameter="Idempotency-Key") from error
        except GenServeError as error:
            raise self.context.failure(error) from error

    async def find(self, task_id: str) -> StoredTask:
        """Return one of the caller's tasks.

        Raises:
            Failure: The caller has no such task.
        """
        is_id = re.fullmatch(ID, task_id)
        task = await self.answer(self.tasks.store.get(task_id, self.owner)) if is_id else None
        if task is None:
            raise Failure(404, "NotFound", "there is no such task")
        return task


async def _caller(request: Request, context: InContext) -> Caller:
    return Caller(request, context)


InCaller = Annotated[Caller, Depends(_caller)]


@router.post(PATH, status_code=202, summary="Accept a task")
async def submit(
    body: AnyTask,
    caller: InCaller,
    response: Response,
    idempotency_key: Annotated[str | None, Header(pattern=PRINTABLE)] = None,
) -> dict[str, Any]:
    """Accept an image with a `prompt`, or a ranking with a `query`; the arguments are those of the client.

    A request with the Idempotency-Key of an earlier one is answered with the earlier task.
    """
    try:
        new = body.task(owner=caller.owner, idempotency_key=idempotency_key)
        if new.webhook_url is not None:
            caller.tasks.webhooks.check(new.webhook_url)
    except GenServeError as error:
        raise caller.context.failure(error) from error
    task = await caller.answer(caller.tasks.store.add(new))
    caller.tasks.runner.wake()
    response.headers["Location"] = caller.context.link(f"{PATH}/{task.id}")
    return shown(task, caller.context.link)


@router.get(PATH, summary="List the caller's tasks")
async def page(
    caller: InCaller,
    limit: Annotated[int, Query(ge=1, le=LONGEST_PAGE)] = PAGE,
    after: Annotated[str | None, Query(pattern=ID)] = None,
    state: State | None = None,
) -> dict[str, Any]:
    """List the caller's tasks, the newest first. `next` is the `after` of the next page."""
    found = await caller.answer(caller.tasks.store.page(caller.owner, limit=limit + 1, after=after, state=state))
    shown_tasks = [shown(task, caller.context.link) for task in found[:limit]]
    return {"object": "list", "data": shown_tasks, "next": found[limit - 1].id if len(found) > limit else None}


@router.get(f"{PATH}/{{task_id}}", summary="State, progress and result of a task")
async def show(task_id: str, caller: InCaller, b64_json: bool = False) -> dict[str, Any]:
    """Show a task, with a preview of an unfinished image; with `b64_json`, a finished one is part of the answer."""
    task = await caller.find(task_id)
    position = await caller.answer(caller.tasks.store.position(task)) if task.state == "queued" else None
    is_painted = task.kind == "image" and task.state == "running"
    live = await caller.tasks.runner.look(task) if is_painted else None
    view = shown(task, caller.context.link, live=live, position=position, documents=True)
    view["preview"] = base64.b64encode(live.preview).decode() if live and live.preview else None
    if b64_json and task.file and caller.context.durable.files:
        data = await caller.context.durable.files.read(task.file)
        view["result"]["b64_json"] = data and base64.b64encode(data).decode()
    return view


@router.get(f"{PATH}/{{task_id}}/events", summary="Follow a task", response_class=EventSourceResponse)
async def events(task_id: str, caller: InCaller) -> EventSourceResponse:
    """Send the task's present state, and then each change until it ends, as server-sent events."""
    task = await caller.find(task_id)
    return EventSourceResponse(follow(caller.tasks, task, caller.context.link))


@router.delete(f"{PATH}/{{task_id}}", summary="Cancel a task")
async def cancel(task_id: str, caller: InCaller) -> dict[str, Any]:
    """Cancel a task here and on its server. A task that has ended stays as it is."""
    task = await caller.find(task_id)
    if await caller.answer(caller.tasks.store.cancel(task)):
        task = await caller.find(task_id)
        caller.tasks.runner.cancel(task)
        caller.tasks.webhooks.wake()
    return shown(task, caller.context.link)
