"""Handles of submitted requests: progress, preview, cancellation and result."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any

from PIL import Image

from genserve.background import LOOP
from genserve.errors import Cancelled, GenServeError
from genserve.types import GeneratedImage, TaskStatus

POLL_S = 0.2
"""Seconds between two looks at a task's progress; servers report it up to ten times a second."""


class AsyncTask:
    """Image in the making. ``await task`` waits for it; ``async for status in task`` follows it.

    Leaving ``async with task:`` cancels it unless it is done.

    Attributes:
        id: The task's id, as for `AsyncClient.task` and in the server's log.
    """

    def __init__(
        self,
        task_id: str,
        work: Coroutine[Any, Any, GeneratedImage],
        *,
        look: Callable[[str], Awaitable[TaskStatus]],
    ) -> None:
        self.id = task_id
        self._work = asyncio.ensure_future(work)
        self._work.add_done_callback(_mark_retrieved)
        self._look = look
        self._seen = TaskStatus(task_id, "waiting")

    @property
    def is_here(self) -> bool:
        """True if the task belongs to the running event loop, not to that of a process before a fork."""
        return self._work.get_loop() is asyncio.get_running_loop()

    def done(self) -> bool:
        """Return whether the task has ended: done, failed or cancelled."""
        return self._work.done()

    async def progress(self) -> TaskStatus:
        """Return the task's state and progress. A task in Triton's queue is ``waiting``."""
        if not self.done():
            try:
                found = await self._look(self.id)
            except GenServeError:
                return self._seen  # The request itself gets the error, or another server.
            if found.is_in_flight:
                self._seen = found
        return _ended(self._seen, self._work) if self.done() else self._seen

    async def preview(self) -> Image.Image | None:
        """Return the unfinished image, small; the finished one if the task is done; None if there is none."""
        status = await self.progress()
        if status.state == "done":
            return self._work.result().image
        return status.preview_image

    async def cancel(self) -> TaskStatus:
        """Cancel the task; return its state at that moment. `result` then raises `Cancelled`."""
        status = await self.progress()
        if not self.done():
            self._work.cancel()
            await asyncio.wait([self._work])
        return status

    async def result(self, timeout: float | None = None) -> GeneratedImage:
        """Wait for the image. Cancelling this wait cancels the task.

        Args:
            timeout: Seconds to wait; None waits for the end. The task goes on after them.

        Raises:
            TimeoutError: The task is not done yet.
            GenServeError: The task failed.
        """
        try:
            await asyncio.wait([self._work], timeout=timeout)
        except asyncio.CancelledError:
            self._work.cancel()
            raise
        if not self._work.done():
            raise TimeoutError(f"task {self.id} is not done after {timeout:g} s")
        if self._work.cancelled():
            raise _cancelled(self.id)
        return self._work.result()

    def __await__(self) -> Generator[Any, None, GeneratedImage]:
        return self.result().__await__()

    async def __aiter__(self) -> AsyncIterator[TaskStatus]:
        before: TaskStatus | None = None
        while True:
            status = await self.progress()
            if status != before:
                yield status
            before = status
            if self.done():
                if status.state in {"waiting", "running"}:
                    yield await self.progress()
                return
            await asyncio.wait([self._work], timeout=POLL_S)

    async def __aenter__(self) -> AsyncTask:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.done():
            await self.cancel()


class Task:
    """Image in the making. Iteration yields its progress until the end.

    Leaving ``with task:`` cancels it unless it is done.

    Attributes:
        id: The task's id, as for `Client.task` and in the server's log.
    """

    def __init__(self, task: AsyncTask) -> None:
        self.id = task.id
        self._task = task

    def done(self) -> bool:
        """Return whether the task has ended: done, failed or cancelled."""
        return self._task.done()

    def progress(self) -> TaskStatus:
        """Return the task's state and progress. A task in Triton's queue is ``waiting``."""
        return LOOP.run(self._task.progress())

    def preview(self) -> Image.Image | None:
        """Return the unfinished image, small; the finished one if the task is done; None if there is none."""
        return LOOP.run(self._task.preview())

    def cancel(self) -> TaskStatus:
        """Cancel the task; return its state at that moment. `result` then raises `Cancelled`."""
        return LOOP.run(self._task.cancel())

    def result(self, timeout: float | None = None) -> GeneratedImage:
        """Wait for the image.

        Args:
            timeout: Seconds to wait; None waits for the end. The task goes on after them.

        Raises:
            TimeoutError: The task is not done yet.
            GenServeError: The task failed.
        """
        return LOOP.run(self._task.result(timeout))

    def __iter__(self) -> Iterator[TaskStatus]:
        return LOOP.iterate(self._task.__aiter__())

    def __enter__(self) -> Task:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.done():
            self.cancel()


def _ended(seen: TaskStatus, work: asyncio.Future[GeneratedImage]) -> TaskStatus:
    """Return the last seen status, with the state in which the task ended."""
    if work.cancelled():
        return replace(seen, state="cancelled", error="cancelled by the caller")
    error = work.exception()
    if isinstance(error, Cancelled):
        return replace(seen, state="cancelled", error=str(error))
    if error:
        return replace(seen, state="failed", error=str(error))
    steps = int(work.result().info.get("steps", seen.steps))
    return replace(seen, state="done", step=steps, steps=steps)


def _cancelled(task_id: str) -> Cancelled:
    error = Cancelled("cancelled by the caller")
    error.request_id, error.model = task_id, "flux"
    return error


def _mark_retrieved(work: asyncio.Future[GeneratedImage]) -> None:
    """Keep asyncio from logging the error of a task whose result nobody asks for."""
    if not work.cancelled():
        work.exception()
