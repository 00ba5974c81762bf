"""The servers of a client: choice, failover, retries, and health."""

from __future__ import annotations

import asyncio
import contextvars
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from genserve.background import FAREWELL
from genserve.discovery import Discovery
from genserve.errors import Cancelled, DeadlineExceeded, QueueFull, ServerUnavailable, located
from genserve.protocol import Call, Outputs, tasks_call
from genserve.retry import Deadline, Retries
from genserve.server import Server, answers, slowness

PROBE_FIRST_S = 0.25
PROBE_LONGEST_S = 5.0
"""Seconds between the probes of a server that is set aside; they double from the first to the longest."""
WATCH_S = 5.0
"""Seconds without an answer after which a server with requests in flight is probed."""
MISSED_S = 1.0
"""Seconds between a failed probe and the next one."""
HUNG_PROBES = 3
"""Failed probes in a row after which a server hangs."""
FAREWELL_S = 2.0
"""Seconds in which a server is told of a cancelled request."""

T = TypeVar("T")
Refusal = ServerUnavailable | QueueFull


class Pool:
    """The servers of one client. For use in one event loop at a time.

    A request goes to the server with the fewest requests in flight, weighted by its speed. A server that fails is set
    aside for that model, probed, and taken back when it is ready. A server that does not even answer probes loses its
    requests in flight to the others.

    Args:
        discovery: The servers' addresses.
    """

    def __init__(self, discovery: Discovery) -> None:
        self._discovery = discovery
        self._turns: Counter[str] = Counter()
        """Requests so far, by model."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._watched: dict[Server, asyncio.Task[None]] = {}

    async def servers(self) -> Sequence[Server]:
        """Return all servers."""
        return await self._discovery.servers()

    async def close(self) -> None:
        """Give up all requests in flight, tell their servers, and close all connections."""
        for server in await self.servers():
            for call in server.abandon(lambda: Cancelled("the client was closed")):
                self._say_farewell(server, call)
        farewells = [task for task in self._tasks if task.get_name() == FAREWELL and not task.done()]
        if farewells:
            await asyncio.wait(farewells, timeout=FAREWELL_S)
        for task in self._tasks:
            task.cancel()
        await self._discovery.close()

    async def send(self, call: Call, deadline: Deadline, parse: Callable[[Outputs], T], retry_for: float) -> T:
        """Send a request to one server after another until one accepts it; return the parsed answer.

        Raises:
            GenServeError: The request failed, or no server accepted it before `retry_for` and the deadline ended.
        """

        async def ask(server: Server) -> T:
            with located(url=server.url):
                outputs = await self._infer(server, call, deadline.left())
                return parse(outputs)

        async def attempt() -> T:
            return await self.first(self._by_load(await self.servers(), call.model), ask)

        with located(model=call.model, request_id=call.request_id):
            return await self.with_retries(deadline, attempt, retry_for)

    async def with_retries(self, deadline: Deadline, attempt: Callable[[], Awaitable[T]], retry_for: float) -> T:
        """Return the result of the first attempt that a server accepts."""
        retries = Retries(retry_for, deadline)
        while True:
            try:
                return await attempt()
            except (ServerUnavailable, QueueFull) as error:
                pause = retries.pause_after(error)
                if pause is None:
                    raise
            await asyncio.sleep(pause)

    async def first(self, servers: Sequence[Server], ask: Callable[[Server], Awaitable[T]]) -> T:
        """Return the answer of the first server that accepts the request."""
        refusals: list[Refusal] = []
        for server in servers:
            try:
                return await ask(server)
            except (ServerUnavailable, QueueFull) as error:
                refusals.append(error)
        raise _most_helpful(refusals)

    async def holder(self, request_id: str) -> Server | None:
        """Return the server that has a request of this client in flight."""
        for server in await self.servers():
            if any(each.call.request_id == request_id for each in server.running.values()):
                return server
        return None

    async def _infer(self, server: Server, call: Call, timeout_s: float) -> Outputs:
        self._watch(server)
        try:
            return await server.infer(call, timeout_s)
        except ServerUnavailable:
            failures = server.set_aside(call.model)
            self._spawn(self._probe(server, call.model, failures))
            raise
        except (asyncio.CancelledError, DeadlineExceeded):
            self._say_farewell(server, call)
            raise

    def _say_farewell(self, server: Server, call: Call) -> None:
        """Cancel the task of a request whose caller has gone. Triton does not notice over HTTP; see GrpcTransport."""

        async def cancel() -> None:
            with suppress(Exception):  # The caller has gone, so nobody is left to hear of it.
                await server.transport.infer(tasks_call("cancel", call.request_id), FAREWELL_S)

        if call.request_id:
            self._spawn(cancel(), name=FAREWELL)

    async def _probe(self, server: Server, model: str, failures: int) -> None:
        """Take the server back for a model once it says that it is ready."""
        pause = min(PROBE_FIRST_S * 2 ** min(failures - 1, 10), PROBE_LONGEST_S)
        while server.is_aside(model):
            await asyncio.sleep(pause * random.uniform(0.75, 1.25))  # noqa: S311  # not security-relevant
            if await answers(server.transport.ready(model)):
                server.take_back(model)
            pause = min(2 * pause, PROBE_LONGEST_S)

    def _watch(self, server: Server) -> None:
        task = self._watched.get(server)
        if task is None or task.done() or task.get_loop() is not asyncio.get_running_loop():
            self._watched[server] = self._spawn(self._watch_for_hangs(server))

    async def _watch_for_hangs(self, server: Server) -> None:
        """Move the requests of a server that hangs to the others."""
        missed = 0
        while True:
            await asyncio.sleep(min(WATCH_S, MISSED_S) if missed else WATCH_S)
            silent_since = max(server.answered, min((each.since for each in server.running.values()), default=0.0))
            if not server.running or time.monotonic() - silent_since < WATCH_S:
                missed = 0
                continue
            missed = 0 if await answers(server.transport.live()) else missed + 1
            if missed >= HUNG_PROBES:
                server.abandon(lambda: ServerUnavailable(f"{server.url}: stopped answering"))
                missed = 0

    def _spawn(self, work: Coroutine[Any, Any, None], name: str | None = None) -> asyncio.Task[None]:
        # Watches and probes serve all requests, so they inherit nothing from the one that happened to start them.
        context = contextvars.copy_context() if name else contextvars.Context()
        task = context.run(asyncio.ensure_future, work)
        if name:
            task.set_name(name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _by_load(self, servers: Sequence[Server], model: str) -> list[Server]:
        """Return the servers, the least busy healthy one first. Equally busy servers take turns."""
        count, turn = len(servers), self._turns[model]
        self._turns[model] += 1
        known = [seconds for server in servers if (seconds := server.duration_s(model)) is not None]
        fastest_s = min(known, default=0.0)

        def cost(index: int) -> tuple[bool, int, int, int]:
            server = servers[index]
            slow = slowness(server, model, fastest_s)
            return server.is_aside(model), len(server.running) * slow, slow, (index - turn) % count

        return [servers[index] for index in sorted(range(count), key=cost)]


def _most_helpful(refusals: Sequence[Refusal]) -> Refusal:
    """Return the most helpful refusal: the shortest `retry_after`, else a full queue, else the last failure."""
    full = [error for error in refusals if isinstance(error, QueueFull)]
    retryable = [error for error in full if error.retry_after is not None]
    if retryable:
        return min(retryable, key=lambda error: error.retry_after or 0.0)
    return full[0] if full else refusals[-1]
