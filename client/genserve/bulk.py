"""Many requests: an iterable of any length in bounded memory, several requests in flight."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from genserve.background import LOOP
from genserve.concurrency import Concurrency
from genserve.errors import DeadlineExceeded, GenServeError, InvalidInput, QueueFull
from genserve.retry import Deadline

AHEAD = 4
"""Limit on the results that wait for an earlier one, as a multiple of the requests in flight."""
PAUSE_S = 0.2
"""Seconds before a request that met a full queue is sent again."""

T = TypeVar("T")


@dataclass(frozen=True)
class MapResult(Generic[T]):
    """Result of one item of a bulk call.

    Attributes:
        index: The item's position in the iterable, from 0.
        item: The item as given.
        result: The image or ranking; None if the item failed.
        error: The reason of the failure, else None.
    """

    index: int
    item: Any
    result: T | None = field(repr=False)
    error: GenServeError | None = None

    @property
    def ok(self) -> bool:
        """True if the item succeeded."""
        return self.error is None


class Bulk(Generic[T]):
    """Requests of a bulk call. For use in one event loop.

    The caller advances it with one item after another, and then without items until it is idle.

    Args:
        send: Sends one item, with the limit in seconds on all its attempts.
        concurrency: Limit on the requests in flight.
        ordered: Return results in the order of the items.
        timeout: Seconds for an item, including the waits for full queues.
    """

    def __init__(
        self, send: Callable[[Any, float], Awaitable[T]], concurrency: Concurrency, *, ordered: bool, timeout: float
    ) -> None:
        self._send = send
        self._concurrency = concurrency
        self._ordered = ordered
        self._timeout = timeout
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting = 0
        """Items that met a full queue."""
        self._finished: dict[int, MapResult[T]] = {}
        self._ready: deque[MapResult[T]] = deque()
        self._next = 0
        self._defect: BaseException | None = None
        """Exception that no item may raise: the caller gets it, in place of a result that never comes."""
        self._changed = asyncio.Event()

    @property
    def is_idle(self) -> bool:
        """True if every item that was started has been returned."""
        return not (self._tasks or self._finished or self._ready or self._defect)

    async def advance(self, *numbered: tuple[int, Any], more: bool) -> list[MapResult[T]]:
        """Start items, and return the results that are there when the call ends.

        Args:
            *numbered: Items with their indices, which count from 0.
            more: Wait until another item may start; else until there are results.
        """
        for index, item in numbered:
            task = asyncio.ensure_future(self._run(index, item))
            self._tasks.add(task)
            task.add_done_callback(self._leave)
        found: list[MapResult[T]] = []
        while True:
            if self._defect:
                raise self._defect
            found += self._ready
            self._ready.clear()
            if self.is_idle or (self._room if more else found):
                return found
            self._changed.clear()
            await self._changed.wait()

    @property
    def _room(self) -> int:
        """Number of items that may start now."""
        ahead = AHEAD * self._concurrency.limit - len(self._finished) - len(self._tasks)
        return max(0, min(self._concurrency.room(len(self._tasks)), ahead))

    def _leave(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            self._defect = self._defect or task.exception()
        self._changed.set()

    async def close(self) -> None:
        """Cancel everything that is in flight."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _run(self, index: int, item: Any) -> None:
        try:
            result, error = await self._answer(item), None
        except GenServeError as failure:
            result, error = None, failure
        self._concurrency.completed(len(self._tasks))
        self._finished[index] = MapResult(index, item, result, error)
        self._release()

    async def _answer(self, item: Any) -> T:
        deadline = Deadline(self._timeout)
        refusal: QueueFull | None = None
        while True:
            try:
                return await self._send(item, deadline.left())
            except QueueFull as error:
                refusal = error
            except DeadlineExceeded as error:
                raise error if error.sent or refusal is None else refusal from None
            pause = PAUSE_S if refusal.retry_after is None else refusal.retry_after
            if time.monotonic() + pause >= deadline.at:
                raise refusal
            self._waiting += 1
            try:
                self._concurrency.refused(len(self._tasks) - self._waiting)
                await asyncio.sleep(pause)
            finally:
                self._waiting -= 1

    def _release(self) -> None:
        if self._ordered:
            while self._next in self._finished:
                self._ready.append(self._finished.pop(self._next))
                self._next += 1
        else:
            self._ready.extend(self._finished.values())
            self._finished.clear()


class BulkCall(Generic[T]):
    """Results of a bulk call: ``async for result in call``.

    Args:
        items: The items, read as needed.
        make: Factory of the requests, called in the event loop.
        progress: Show a progress bar.
    """

    def __init__(
        self, items: Iterable[Any] | AsyncIterable[Any], make: Callable[[], Awaitable[Bulk[T]]], *, progress: bool
    ) -> None:
        self._items = items
        self._make = make
        self._progress = progress

    async def __aiter__(self) -> AsyncIterator[MapResult[T]]:
        bar, bulk, index = self._bar(), await self._make(), 0
        try:
            async for item in _asynchronous(self._items):
                for result in await bulk.advance((index, item), more=True):
                    yield bar.counted(result)
                index += 1
            while not bulk.is_idle:
                for result in await bulk.advance(more=False):
                    yield bar.counted(result)
        finally:
            bar.close()
            await bulk.close()

    def blocking(self) -> Iterator[MapResult[T]]:
        """Yield the results outside the event loop. The items are read in the caller's thread."""
        bar, bulk = self._bar(), LOOP.run(_awaited(self._make()))
        try:
            for index, item in enumerate(cast("Iterable[Any]", self._items)):
                yield from map(bar.counted, LOOP.run(bulk.advance((index, item), more=True)))
            while not bulk.is_idle:
                yield from map(bar.counted, LOOP.run(bulk.advance(more=False)))
        finally:
            bar.close()
            LOOP.run(bulk.close())

    def _bar(self) -> Progress:
        return Progress(len(self._items) if isinstance(self._items, Sized) else None, shown=self._progress)


async def _asynchronous(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


async def _awaited(awaitable: Awaitable[T]) -> T:
    return await awaitable


def item_arguments(
    item: Any, verb: Callable[..., Any], positional: tuple[str, ...], shared: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of one item's request.

    Args:
        item: A mapping of arguments, one text, or a tuple of the arguments named by `positional`.
        verb: The client's method.
        positional: Names of the arguments that an item may give without a name.
        shared: Arguments for every item; the item's own win.

    Raises:
        InvalidInput: The item has another form, or an argument that the verb does not have.
    """
    if isinstance(item, Mapping):
        own = dict(item)
    elif isinstance(item, str) and len(positional) == 1:
        own = {positional[0]: item}
    elif isinstance(item, (tuple, list)) and len(item) == len(positional) > 1:
        own = dict(zip(positional, item, strict=True))
    else:
        form = positional[0] if len(positional) == 1 else f"({', '.join(positional)})"
        raise InvalidInput(f"item is {item!r:.80}; allowed: {form}, or a mapping of arguments")
    arguments = {**shared, **own}
    try:
        inspect.signature(verb).bind(**arguments)
    except TypeError as error:
        raise InvalidInput(f"item: {error}") from None
    return arguments


class Progress:
    """Progress bar of a bulk call: done, failed, rate and time left.

    Args:
        total: Number of items; None if unknown, and then the bar shows no time left.
        shown: Show the bar.
    """

    def __init__(self, total: int | None, *, shown: bool) -> None:
        self._bar: Any = None
        self._failed = 0
        if shown:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, unit="request", smoothing=0.05)
            self._bar.set_postfix(failed=0)

    def counted(self, result: MapResult[T]) -> MapResult[T]:
        """Count a result and return it."""
        self.advance(failed=not result.ok)
        return result

    def advance(self, *, failed: bool = False) -> None:
        """Count an item."""
        if self._bar is not None:
            if failed:
                self._failed += 1
                self._bar.set_postfix(failed=self._failed, refresh=False)
            self._bar.update()

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
