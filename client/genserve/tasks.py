"""Task status and cancellation on one or several servers."""

from __future__ import annotations

from collections.abc import Sequence

from genserve.errors import GenServeError, InvalidInput, located
from genserve.protocol import task_list, task_status, tasks_call
from genserve.retry import Deadline
from genserve.transport import Transport
from genserve.types import TaskStatus

TASKS_TIMEOUT_S = 10.0
"""Timeout of the `tasks` model, which answers at once on a healthy server."""


def in_flight(server: Transport) -> list[TaskStatus]:
    """Return a server's tasks in flight, none if its `tasks` model is missing or not ready."""
    try:
        return task_list(server.infer(tasks_call("list"), TASKS_TIMEOUT_S))
    except GenServeError:
        return []


def find(servers: Sequence[Transport], task_id: str, deadline: Deadline) -> TaskStatus:
    """Return the task from the server that has it in flight, else from the server where it changed last.

    Raises:
        GenServeError: No server answers.
    """
    return _best([task for _, task in _ask(servers, "status", task_id, deadline)])


def cancel(servers: Sequence[Transport], task_id: str, deadline: Deadline) -> TaskStatus:
    """Cancel the task where it is in flight and return its state there.

    A task that is in flight nowhere may wait in a Triton queue, which no server can see. Every server then gets the
    cancellation and keeps it until the task arrives.

    Raises:
        GenServeError: No server answers.
    """
    found = _ask(servers, "status", task_id, deadline)
    holders = [server for server, task in found if task.is_in_flight] or [server for server, _ in found]
    return _best([task for _, task in _ask(holders, "cancel", task_id, deadline)])


def _ask(
    servers: Sequence[Transport], action: str, task_id: str, deadline: Deadline
) -> list[tuple[Transport, TaskStatus]]:
    """Return every answer with its server. Unreachable servers are skipped."""
    if not task_id:
        raise InvalidInput("TASK_ID is empty; allowed: the id of a task")
    call = tasks_call(action, task_id)
    answers: list[tuple[Transport, TaskStatus]] = []
    failures: list[GenServeError] = []
    for server in servers:
        try:
            with located(url=server.url, model=call.model):
                answers.append((server, task_status(server.infer(call, min(TASKS_TIMEOUT_S, deadline.left())))))
        except GenServeError as error:
            failures.append(error)
    if not answers:
        raise failures[0]
    return answers


def _best(tasks: Sequence[TaskStatus]) -> TaskStatus:
    return max(tasks, key=lambda task: (task.is_in_flight, task.state != "unknown", task.changed or 0.0))
