"""Task status and cancellation on one or several servers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from genserve.errors import GenServeError, InvalidInput, located
from genserve.protocol import Call, Outputs, task_list, task_status, tasks_call
from genserve.retry import Deadline
from genserve.server import Server
from genserve.transport import AsyncTransport
from genserve.types import TaskStatus

TASKS_TIMEOUT_S = 10.0
"""Timeout of the `tasks` model, which answers at once on a healthy server."""


async def in_flight(server: AsyncTransport) -> list[TaskStatus]:
    """Return a server's tasks in flight, none if its `tasks` model is missing or not ready."""
    try:
        return task_list(await server.infer(tasks_call("list"), TASKS_TIMEOUT_S))
    except GenServeError:
        return []


async def find(servers: Sequence[Server], task_id: str, deadline: Deadline) -> TaskStatus:
    """Return the task from the server that has it in flight, else from the server where it changed last.

    Raises:
        GenServeError: No server answers.
    """
    return _best([task for _, task in await _ask_for(servers, "status", task_id, deadline)])


async def cancel(servers: Sequence[Server], task_id: str, deadline: Deadline) -> TaskStatus:
    """Cancel the task where it is in flight and return its state there.

    A task that is in flight nowhere may wait in a Triton queue, which no server can see. Every server then gets the
    cancellation and keeps it until the task arrives.

    Raises:
        GenServeError: No server answers.
    """
    found = await _ask_for(servers, "status", task_id, deadline)
    holders = [server for server, task in found if task.is_in_flight] or [server for server, _ in found]
    return _best([task for _, task in await _ask_for(holders, "cancel", task_id, deadline)])


async def ask(servers: Sequence[Server], call: Call, deadline: Deadline) -> list[tuple[Server, Outputs]]:
    """Send a request of the `tasks` model to all servers; return every answer with its server.

    Raises:
        GenServeError: No server answers. Single unreachable servers are skipped.
    """

    async def ask_one(server: Server) -> Outputs:
        with located(url=server.url, model=call.model):
            return await server.transport.infer(call, min(TASKS_TIMEOUT_S, deadline.left()))

    found = await asyncio.gather(*map(ask_one, servers), return_exceptions=True)
    answers: list[tuple[Server, Outputs]] = []
    failures: list[GenServeError] = []
    for server, answer in zip(servers, found, strict=True):
        if isinstance(answer, GenServeError):
            failures.append(answer)
        elif isinstance(answer, BaseException):
            raise answer
        else:
            answers.append((server, answer))
    if not answers:
        raise failures[0]
    return answers


async def _ask_for(
    servers: Sequence[Server], action: str, task_id: str, deadline: Deadline
) -> list[tuple[Server, TaskStatus]]:
    if not task_id:
        raise InvalidInput("TASK_ID is empty; allowed: the id of a task")
    return [
        (server, task_status(outputs)) for server, outputs in await ask(servers, tasks_call(action, task_id), deadline)
    ]


def _best(tasks: Sequence[TaskStatus]) -> TaskStatus:
    return max(tasks, key=lambda task: (task.is_in_flight, task.state != "unknown", task.changed or 0.0))
