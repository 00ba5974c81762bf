"""Asynchronous client: the core of both clients."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import secrets
import uuid
from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

from genserve import tasks
from genserve.access import TLS, Address, checked_headers
from genserve.bulk import Bulk, BulkCall, item_arguments
from genserve.concurrency import Concurrency
from genserve.discovery import Discovery
from genserve.errors import InvalidInput, located
from genserve.handles import AsyncTask
from genserve.pool import Pool
from genserve.protocol import (
    Call,
    Outputs,
    generate_call,
    generated_image,
    instance_loads,
    ranking,
    rerank_call,
    settings_in_force,
    tasks_call,
)
from genserve.retry import Deadline, checked_timeout
from genserve.server import Server, answers
from genserve.status import model_statuses, server_status
from genserve.transport import AsyncTransport, Transport, adapted, connect_to
from genserve.types import (
    Adapters,
    GeneratedImage,
    ImageFormat,
    InstanceLoad,
    ModelStatus,
    Priority,
    Ranking,
    ServerStatus,
    Setting,
    TaskStatus,
)

DEFAULT_URL = "localhost:8001"
DEFAULT_TIMEOUT_S = 600.0
"""Longer than the server lets a request wait and run. tritonclient's default over gRPC has no limit."""
MAP_RETRY_S = 60.0
"""Default of a bulk call's `retry_for`: a server that restarts should not fail what comes meanwhile."""

T = TypeVar("T")
Record = TypeVar("Record", InstanceLoad, Setting)
OnProgress = Callable[[TaskStatus], object]
"""Function that is called with each new state of a task."""
GivenTransport = Transport | AsyncTransport


class AsyncClient:
    """Client for one GenServe server, or for several that share its requests, for use with asyncio.

    A request goes to the server with the fewest of this client's requests in flight, weighted by its speed. A server
    that fails is set aside until it is ready again, and its requests go to the others. Requests are pure functions of
    their inputs, so sending one again is safe. Cancelling an ``await`` cancels the request on its server.

    Args:
        url: ``host:port`` or ``grpcs://host`` for gRPC, ``http://host:port`` or ``https://host/prefix`` for HTTP, or a
            list of either. Default: ``localhost:8001``. A DNS name with several addresses counts as several servers.
        timeout: Default deadline of a call, in seconds. Servers receive it and abort a request that passes it.
        retry_for: Seconds to retry while no server is reachable or a gateway asks to retry later. 0 fails at once.
        tls: Certificates for ``grpcs://`` and ``https://``.
        headers: Headers of every request, as ``{"Authorization": "Bearer ..."}``; over gRPC they are metadata.
        transport: One or several custom transports in place of `url`, `tls` and `headers`, for tests of code that uses
            a client. See `genserve.Transport`.

    Raises:
        InvalidInput: An argument is not usable.
    """

    def __init__(
        self,
        url: str | Sequence[str] | None = None,
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        retry_for: float = 0.0,
        tls: TLS | None = None,
        headers: Mapping[str, str] | None = None,
        transport: GivenTransport | Sequence[GivenTransport] | None = None,
    ) -> None:
        self._timeout = checked_timeout(timeout)
        self._retry_for = _checked_retry_for(retry_for)
        connect = functools.partial(connect_to, tls=tls or TLS(), headers=checked_headers(headers))
        servers: list[tuple[Server, Address | None]]
        if transport is None:
            given = DEFAULT_URL if url is None else url
            urls = [given] if isinstance(given, str) else given
            addresses = [(each, Address.parse(each)) for each in urls]
            servers = [(Server(connect(address, each)), address) for each, address in addresses]
        elif url is not None or tls is not None or headers is not None:
            raise InvalidInput("transport is given together with url, tls or headers; allowed: transport alone")
        else:
            transports = transport if isinstance(transport, Sequence) else [transport]
            servers = [(Server(adapted(each)), None) for each in transports]
        if not servers:
            raise InvalidInput(f"{'url' if transport is None else 'transport'} is an empty list; allowed: at least one")
        self._pool = Pool(Discovery(servers, connect))
        self._submitted: set[AsyncTask] = set()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel submitted tasks that are not done, and close all connections."""
        # A task of another loop is that of a parent process: it can neither be cancelled nor awaited here.
        unfinished = [task for task in self._submitted if task.is_here and not task.done()]
        await asyncio.gather(*(task.cancel() for task in unfinished))
        await self._pool.close()

    async def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        true_cfg_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | None = None,
        lora: Adapters = (),
        cache: float | None = None,
        format: ImageFormat | None = None,  # noqa: A002  # the tensor's name
        priority: Priority = "normal",
        timeout: float | None = None,
        task_id: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> GeneratedImage:
        """Generate an image. An argument that is None selects the checkpoint's default.

        Args:
            prompt: 1 to 10,000 characters.
            negative_prompt: Content to keep out of the image; turns on true classifier-free guidance.
            true_cfg_scale: Scale of true classifier-free guidance, 1 to 20.
            height: Pixels, a multiple of 16, at least 64.
            width: Pixels, a multiple of 16, at least 64.
            steps: Denoising steps, 1 to 100.
            guidance: Guidance scale, 0 to 20.
            seed: 0 to 2**63 - 1; the same seed gives the same image. Default: a random one, drawn by the client.
            lora: LoRA adapters that the server has: a name, ``(name, weight)``, ``{name: weight}``, or a list of names,
                pairs or ``{"name": name, "weight": weight}``. The default weight is 1.
            cache: Threshold for skipping steps that would hardly change the image, 0 to 1; 0 skips none.
            format: ``png``, ``jpeg`` or ``webp``.
            priority: ``high``, ``normal`` or ``low``.
            timeout: Deadline of the call, in seconds.
            task_id: The caller's own id, at most 256 characters, for `task`, `cancel` and the server's log.
            on_progress: Function that is called with a `TaskStatus` whenever the task's state or step has changed. An
                asynchronous client awaits its result if it is awaitable.

        Raises:
            GenServeError: See `genserve.errors`.
        """
        if on_progress is not None and not callable(on_progress):
            raise InvalidInput(f"on_progress is {on_progress!r:.80}; allowed: a function")
        call = generate_call(
            prompt,
            negative_prompt=negative_prompt,
            true_cfg_scale=true_cfg_scale,
            height=height,
            width=width,
            steps=steps,
            guidance=guidance,
            # Drawn here, so that a request that is sent again makes the same image.
            seed=secrets.randbelow(2**63) if seed is None else seed,
            lora=lora,
            cache=cache,
            format=format,
            priority=priority,
            task_id=task_id or uuid.uuid4().hex,
        )
        work = self._infer(call, timeout, generated_image)
        if on_progress is None:
            return await work
        async with self._task(call.request_id, work) as task:
            async for status in task:
                answer = on_progress(status)
                if inspect.isawaitable(answer):
                    await answer
            return await task.result()

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        instruction: str | None = None,
        windows: int = 1,
        priority: Priority = "normal",
        timeout: float | None = None,
        task_id: str | None = None,
    ) -> Ranking:
        """Score documents against a query and sort them by relevance.

        Args:
            query: 1 to 10,000 characters.
            documents: 1 to 1,000 texts.
            top_n: Number of documents to return; None returns all.
            instruction: Task instruction of instruction-tuned rerankers; None selects the model's own.
            windows: Maximum number of overlapping windows, 1 to 64, for a document beyond the model's length limit. The
                highest window score counts. 1 truncates the document.
            priority: ``high``, ``normal`` or ``low``.
            timeout: Deadline of the call, in seconds.
            task_id: The caller's own id, at most 256 characters, for `task`, `cancel` and the server's log.

        Raises:
            GenServeError: See `genserve.errors`.
        """
        if top_n is not None and (not isinstance(top_n, int) or top_n < 1):
            raise InvalidInput(f"top_n is {top_n!r:.80}; allowed: at least 1")
        if not isinstance(documents, Iterable):
            raise InvalidInput(f"DOCUMENTS is {documents!r:.80}; allowed: a list of 1 to 1,000 documents")
        if isinstance(documents, (str, bytes)):
            raise InvalidInput("DOCUMENTS is one text; allowed: a list of 1 to 1,000 documents")
        documents = list(documents)
        if not documents:
            raise InvalidInput("DOCUMENTS is an empty list; allowed: 1 to 1,000 documents")
        call = rerank_call(
            query,
            documents,
            instruction=instruction,
            windows=windows,
            priority=priority,
            task_id=task_id or uuid.uuid4().hex,
        )
        return await self._infer(call, timeout, lambda outputs: ranking(outputs, documents, top_n))

    def submit(self, prompt: str, **arguments: Any) -> AsyncTask:
        """Start to generate an image, and return its task at once.

        Args:
            prompt: 1 to 10,000 characters.
            **arguments: The arguments of `generate`.
        """
        task_id = arguments.pop("task_id", None) or uuid.uuid4().hex
        task = self._task(task_id, self.generate(prompt, task_id=task_id, **arguments))
        self._submitted = {each for each in self._submitted if not each.done()} | {task}
        return task

    def map_generate(
        self,
        /,  # `shared` may hold any name
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        concurrency: int | None = None,
        ordered: bool = True,
        progress: bool = False,
        retry_for: float = MAP_RETRY_S,
        **shared: Any,
    ) -> BulkCall[GeneratedImage]:
        """Generate an image for each item, several at once. Iterate over the results. A failed item stops no other.

        Args:
            items: Prompts, or mappings of `generate`'s arguments; an iterable of any length, read as needed.
            concurrency: Number of requests in flight. None finds the one with the highest throughput.
            ordered: Return the results in the order of the items; else as they complete.
            progress: Show a progress bar on stderr.
            retry_for: Seconds to retry an item while no server is reachable.
            **shared: Arguments of `generate` for every item.

        Raises:
            InvalidInput: An argument of this call is not usable.
        """
        verbs = {"generate": ("prompt",)}
        return self._map(items, verbs, concurrency, shared, ordered=ordered, progress=progress, retry_for=retry_for)

    def map_rerank(
        self,
        /,  # `shared` may hold any name
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        concurrency: int | None = None,
        ordered: bool = True,
        progress: bool = False,
        retry_for: float = MAP_RETRY_S,
        **shared: Any,
    ) -> BulkCall[Ranking]:
        """Rank each item's documents, several items at once. Iterate over the results. A failed item stops no other.

        Args:
            items: Tuples of query and documents, or mappings of `rerank`'s arguments; an iterable of any length, read
                as needed.
            concurrency: Number of requests in flight. None finds the one with the highest throughput.
            ordered: Return the results in the order of the items; else as they complete.
            progress: Show a progress bar on stderr.
            retry_for: Seconds to retry an item while no server is reachable.
            **shared: Arguments of `rerank` for every item.

        Raises:
            InvalidInput: An argument of this call is not usable.
        """
        verbs = {"rerank": ("query", "documents")}
        return self._map(items, verbs, concurrency, shared, ordered=ordered, progress=progress, retry_for=retry_for)

    def map(
        self,
        /,  # `shared` may hold any name
        items: Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]],
        *,
        concurrency: int | None = None,
        ordered: bool = True,
        progress: bool = False,
        retry_for: float = MAP_RETRY_S,
        **shared: Any,
    ) -> BulkCall[GeneratedImage | Ranking]:
        """Generate an image for each item with a prompt, and rank the documents of each item with a query.

        Args:
            items: Mappings of the arguments of `generate` or `rerank`; an iterable of any length, read as needed.
            concurrency: Number of requests in flight. None finds the one with the highest throughput.
            ordered: Return the results in the order of the items; else as they complete.
            progress: Show a progress bar on stderr.
            retry_for: Seconds to retry an item while no server is reachable.
            **shared: Arguments of both verbs for every item.

        Raises:
            InvalidInput: An argument of this call is not usable.
        """
        verbs = {"generate": ("prompt",), "rerank": ("query", "documents")}
        return self._map(items, verbs, concurrency, shared, ordered=ordered, progress=progress, retry_for=retry_for)

    async def task(self, task_id: str) -> TaskStatus:
        """Return a task's state, progress and preview.

        Args:
            task_id: The `task_id` given to `generate` or `rerank`.

        Raises:
            GenServeError: See `genserve.errors`. An id that no server has is no error; its state is ``unknown``.
        """
        return await self._ask_tasks(tasks.find, task_id)

    async def cancel(self, task_id: str) -> TaskStatus:
        """Cancel a task and return its state at that moment. Its own caller gets `Cancelled`.

        A running task ends at its next step. A task in Triton's queue, which `tasks` cannot see, ends as soon as it
        leaves the queue. A task that has ended is unchanged.

        Args:
            task_id: The `task_id` given to `generate` or `rerank`.

        Raises:
            GenServeError: See `genserve.errors`.
        """
        return await self._ask_tasks(tasks.cancel, task_id)

    async def health(self) -> bool:
        """Return whether at least one server has all of its models ready."""
        servers = await self._pool.servers()
        return any(await asyncio.gather(*(answers(server.transport.ready()) for server in servers)))

    async def status(self) -> list[ServerStatus]:
        """Return each server's state. An unreachable server is listed with ``live=False``."""
        servers = await self._pool.servers()
        return list(await asyncio.gather(*(server_status(server.transport) for server in servers)))

    async def models(self) -> list[ModelStatus]:
        """Return the models of the first reachable server.

        Raises:
            ServerUnavailable: No server is reachable.
        """

        async def ask(server: Server) -> list[ModelStatus]:
            with located(url=server.url):
                return await model_statuses(server.transport)

        return await self._pool.first(await self._pool.servers(), ask)

    async def gpu_load(self) -> list[InstanceLoad]:
        """Return the load and memory of each instance on all reachable servers.

        Raises:
            GenServeError: No server answers.
        """
        return await self._ask_all("load", instance_loads)

    async def config(self) -> list[Setting]:
        """Return each model's settings in force, with their sources, of all reachable servers.

        Raises:
            GenServeError: No server answers.
        """
        return await self._ask_all("config", settings_in_force)

    async def _infer(self, call: Call, timeout: float | None, parse: Callable[[Outputs], T]) -> T:
        deadline = Deadline(self._timeout if timeout is None else timeout)
        return await self._pool.send(call, deadline, parse, self._retry_for)

    async def _ask_all(self, action: str, parse: Callable[[Outputs], list[Record]]) -> list[Record]:
        deadline = Deadline(self._timeout)
        servers = await self._pool.servers()

        async def ask() -> list[Record]:
            answers = await tasks.ask(servers, tasks_call(action), deadline)
            return [replace(each, url=server.url) for server, outputs in answers for each in parse(outputs)]

        return await self._pool.with_retries(deadline, ask, self._retry_for)

    async def _ask_tasks(
        self, ask: Callable[[Sequence[Server], str, Deadline], Awaitable[TaskStatus]], task_id: str
    ) -> TaskStatus:
        deadline = Deadline(self._timeout)
        servers = await self._pool.servers()
        return await self._pool.with_retries(deadline, lambda: ask(servers, task_id, deadline), self._retry_for)

    def _task(self, task_id: str, work: Coroutine[Any, Any, GeneratedImage]) -> AsyncTask:
        async def look(task_id: str) -> TaskStatus:
            server = await self._pool.holder(task_id)
            servers = [server] if server else await self._pool.servers()
            return await tasks.find(servers, task_id, Deadline(self._timeout))

        return AsyncTask(task_id, work, look=look)

    def _map(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        verbs: Mapping[str, tuple[str, ...]],
        concurrency: int | None,
        shared: Mapping[str, Any],
        *,
        ordered: bool,
        progress: bool,
        retry_for: float,
    ) -> BulkCall[Any]:
        """Return a bulk call of the verbs, which are chosen by their first argument."""
        if concurrency is not None and concurrency < 1:
            raise InvalidInput(f"concurrency is {concurrency}; allowed: at least 1")
        timeout = checked_timeout(self._timeout if shared.get("timeout") is None else shared["timeout"])
        patient = copy.copy(self)
        patient._retry_for = max(self._retry_for, _checked_retry_for(retry_for))

        async def send(item: Any, left_s: float) -> Any:
            verb = next((verb for verb, (key, *_) in verbs.items() if isinstance(item, Mapping) and key in item), None)
            method = getattr(patient, verb or next(iter(verbs)))
            arguments = item_arguments(item, method, verbs[verb or next(iter(verbs))], shared)
            own = arguments.get("timeout")
            timeout = left_s if own is None else min(left_s, checked_timeout(own))
            return await method(**{**arguments, "timeout": timeout})

        async def make() -> Bulk[Any]:
            found = Concurrency(concurrency, len(await self._pool.servers()))
            return Bulk(send, found, ordered=ordered, timeout=timeout)

        return BulkCall(items, make, progress=progress)


def _checked_retry_for(retry_for: float) -> float:
    if not 0 <= retry_for < float("inf"):
        raise InvalidInput(f"retry_for is {retry_for}; allowed: seconds, 0 or more")
    return retry_for
