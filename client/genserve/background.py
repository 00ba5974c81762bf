"""One event loop in a thread of its own, in which all synchronous clients of a process run."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")

CLEANUP_S = 3.0
"""Seconds in which servers are told of cancelled requests at the end of a call or a program."""
FAREWELL = "genserve-cancel"
"""Name of the asyncio tasks that tell them."""


class Background:
    """Event loop in a daemon thread. It starts on first use, and again in a forked child."""

    def __init__(self) -> None:
        self._loop: Loop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._has_ended = False
        os.register_at_fork(after_in_child=self._forget)
        atexit.register(self._stop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop and return its result. An interrupted caller cancels it."""
        if self._has_ended:
            return self._run_late(coroutine)
        work = self._work(coroutine)
        try:
            work.start()
            return work.result()
        except BaseException:
            work.cancel()
            raise

    def run_with_calls(self, start: Callable[[Callable[..., None]], Coroutine[Any, Any, T]], call: Any) -> T:
        """Run a coroutine that calls a function of the caller, in the caller's thread.

        Args:
            start: Factory of the coroutine; its argument is the function to pass on in place of `call`.
            call: Function to be called in the caller's thread. If it raises, the coroutine is cancelled.
        """
        if self._has_ended:
            return self._run_late(start(call))
        arguments: SimpleQueue[tuple[Any, ...] | None] = SimpleQueue()
        work = self._work(start(lambda *given: arguments.put(given)), when_ended=lambda: arguments.put(None))
        try:
            work.start()
            while (given := arguments.get()) is not None:
                call(*given)
            return work.result()
        except BaseException:
            work.cancel()
            raise

    def iterate(self, iterator: AsyncIterator[T]) -> Iterator[T]:
        """Yield what an asynchronous iterator yields."""

        async def following() -> list[T]:
            async for each in iterator:
                return [each]
            return []

        try:
            while found := self.run(following()):
                yield from found
        finally:
            if isinstance(iterator, AsyncGenerator):
                self.run(_closed(iterator))

    def _work(self, coroutine: Coroutine[Any, Any, T], when_ended: Callable[[], object] = lambda: None) -> Work[T]:
        loop = self._started()
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("a synchronous Client was called inside the event loop of all synchronous Clients")
        return Work(loop, coroutine, when_ended)

    def _started(self) -> Loop:
        with self._lock:
            if self._loop is None:
                loop = Loop()
                thread = threading.Thread(target=_serve, args=[loop], name="genserve-client", daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    loop.close()
                    raise
                # Only now: an interruption of the lines above must not leave a loop without its thread.
                self._loop, self._thread = loop, thread
            return self._loop

    def _forget(self) -> None:
        """Forget the parent's loop: a forked child does not have its thread."""
        self._loop = self._thread = None
        self._lock = threading.Lock()

    def _stop(self) -> None:
        """End the work and the loop before the interpreter ends: gRPC's callbacks must not outlive it."""
        loop, thread = self._loop, self._thread
        if loop and thread:
            loop.is_ending = True
            work = Work(loop, _ended())
            work.start()
            with suppress(KeyboardInterrupt):
                work.wait(2 * CLEANUP_S)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(CLEANUP_S)
        self._has_ended = True

    def _run_late(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine at the end of the program, as of an iterator that was left early and is deleted only then."""
        if threading.current_thread() is not threading.main_thread():
            threading.Event().wait()  # Only daemon threads are left, which end here like those in the middle of a call.
        self._loop = self._loop or Loop()
        return self._loop.run_until_complete(coroutine)


class Loop(asyncio.SelectorEventLoop):
    """Event loop of synchronous clients.

    It counts as closed in a forked child. The child has copies of the parent's connections. When they are deleted, as
    at the child's end, closing them would remove them from the epoll object that both processes share: the parent would
    wait forever for its answers.

    Attributes:
        is_ending: The program ends, so nobody waits for the results.
    """

    def __init__(self) -> None:
        super().__init__()
        self._owner = os.getpid()
        self.is_ending = False

    def is_closed(self) -> bool:
        """Return whether nothing can run in the loop."""
        return super().is_closed() or self._owner != os.getpid()

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Log a problem, unless it is that the program ends or was forked before all clients were closed."""
        if not self.is_ending and not self.is_closed():
            super().call_exception_handler(context)


class Work(Generic[T]):
    """Coroutine that runs in a loop, for the one thread that waits for it.

    Args:
        loop: The loop.
        coroutine: The coroutine.
        when_ended: Function to be called in the loop once the coroutine has ended, cancelled or not.
    """

    def __init__(
        self, loop: Loop, coroutine: Coroutine[Any, Any, T], when_ended: Callable[[], object] = lambda: None
    ) -> None:
        self._loop = loop
        self._coroutine = coroutine
        self._when_ended = when_ended
        self._task: asyncio.Future[T] | None = None
        self._has_ended = False
        # Locked until the end. A bare lock: Ctrl-C inside an event or a future could leave it locked for the loop, too.
        self._running = threading.Lock()
        self._running.acquire()

    def start(self) -> None:
        """Start the coroutine. Even if the caller is interrupted here, `cancel` ends it."""
        self._loop.call_soon_threadsafe(self._start)

    def result(self) -> T:
        """Wait for the coroutine's result and return it, or raise its exception."""
        self.wait()
        if self._task is None or self._task.cancelled():
            raise CancelledError
        return self._task.result()

    def wait(self, timeout_s: float = -1) -> None:
        """Wait until the coroutine has ended, at most `timeout_s` seconds unless negative."""
        if not self._has_ended:
            self._running.acquire(timeout=timeout_s)

    def cancel(self) -> None:
        """Cancel the coroutine unless it has ended, and wait for its end, so that servers have been told."""
        if not self._has_ended:
            self._loop.call_soon_threadsafe(self._cancel)
            self.wait(CLEANUP_S)

    def _start(self) -> None:
        self._task = self._loop.create_task(self._coroutine)
        self._task.add_done_callback(self._end)

    def _cancel(self) -> None:
        if self._task:
            self._task.cancel()
        else:
            self._coroutine.close()
            self._end()

    def _end(self, task: asyncio.Future[T] | None = None) -> None:
        if task and task.cancelled() and self._loop.is_ending:
            return  # Only a daemon thread can still wait. It would print the cancellation.
        if task and not task.cancelled():
            task.exception()  # Else asyncio logs that of a caller that was interrupted.
        self._has_ended = True
        self._running.release()
        self._when_ended()


def _serve(loop: Loop) -> None:
    """Run the loop until it is stopped."""
    while True:
        # asyncio raises these two here as well as in the coroutine's caller. Only he is meant, and others wait too.
        with suppress(KeyboardInterrupt, SystemExit):
            loop.run_forever()
            return


async def _closed(iterator: AsyncGenerator[Any, None]) -> None:
    await iterator.aclose()


async def _ended() -> None:
    """Cancel all tasks of the running loop, and wait until servers have been told of cancelled requests."""
    deadline = time.monotonic() + CLEANUP_S
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        if task.get_name() != FAREWELL:
            task.cancel()
    # Cancelled requests begin farewells.
    while (left := asyncio.all_tasks() - {asyncio.current_task()}) and time.monotonic() < deadline:
        await asyncio.wait(left, timeout=deadline - time.monotonic())


LOOP = Background()
"""The loop of this process."""
