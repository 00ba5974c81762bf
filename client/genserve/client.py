"""Synchronous client."""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from genserve import tasks
from genserve.access import TLS
from genserve.errors import InvalidInput, QueueFull, ServerUnavailable, located
from genserve.protocol import Call, Outputs, generate_call, generated_image, ranking, rerank_call
from genserve.retry import Deadline, Retries, checked_timeout
from genserve.status import model_statuses, probe, server_status
from genserve.transport import Transport, connect
from genserve.types import GeneratedImage, ImageFormat, ModelStatus, Priority, Ranking, ServerStatus, TaskStatus

DEFAULT_URL = "localhost:8001"
DEFAULT_TIMEOUT_S = 600.0
"""Longer than the server lets a request wait and run. tritonclient's default over gRPC has no limit."""

T = TypeVar("T")


class Client:
    """Client for one GenServe server, or for several that share its requests. Thread-safe.

    A request goes to the server with the fewest of this client's requests in flight. If that server is unreachable or
    its queue is full, the others are tried in turn. Requests are pure functions of their inputs, so sending one again
    is safe.

    Args:
        url: ``host:port`` or ``grpcs://host`` for gRPC, ``http://host:port`` or ``https://host/prefix`` for HTTP, or a
            list of either. Default: ``localhost:8001``.
        timeout: Default deadline of a call, in seconds. Servers receive it and abort a request that passes it.
        retry_for: Seconds to retry while no server is reachable or a gateway asks to retry later. 0 fails at once.
        tls: Certificates for ``grpcs://`` and ``https://``.
        headers: Headers of every request, as ``{"Authorization": "Bearer ..."}``; over gRPC they are metadata.
        transport: One or several custom transports in place of `url`, `tls` and `headers`, for tests of code that uses
            a Client. See `genserve.Transport`.

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
        transport: Transport | Sequence[Transport] | None = None,
    ) -> None:
        self._timeout = checked_timeout(timeout)
        if not 0 <= retry_for < float("inf"):
            raise InvalidInput(f"retry_for is {retry_for}; allowed: seconds, 0 or more")
        self._retry_for = retry_for
        if transport is None:
            given = DEFAULT_URL if url is None else url
            urls = [given] if isinstance(given, str) else given
            self._servers = [connect(each, tls=tls, headers=headers) for each in urls]
        elif url is not None or tls is not None or headers is not None:
            raise InvalidInput("transport is given together with url, tls or headers; allowed: transport alone")
        else:
            self._servers = list(transport) if isinstance(transport, Sequence) else [transport]
        if not self._servers:
            raise InvalidInput(f"{'url' if transport is None else 'transport'} is an empty list; allowed: at least one")
        self._in_flight = dict.fromkeys(range(len(self._servers)), 0)
        self._turn = itertools.count()
        self._lock = threading.Lock()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        for server in self._servers:
            server.close()

    def generate(
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
        lora: Sequence[dict[str, Any]] = (),
        format: ImageFormat | None = None,  # noqa: A002  # the tensor's name
        priority: Priority = "normal",
        timeout: float | None = None,
        task_id: str | None = None,
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
            seed: 0 to 2**63 - 1; the same seed gives the same image. Default: a random one.
            lora: Adapters, as ``{"name": str, "weight": float}``.
            format: ``png``, ``jpeg`` or ``webp``.
            priority: ``high``, ``normal`` or ``low``.
            timeout: Deadline of the call, in seconds.
            task_id: The caller's own id, at most 256 characters, for `task`, `cancel` and the server's log.

        Raises:
            GenServeError: See `genserve.errors`.
        """
        call = generate_call(
            prompt,
            negative_prompt=negative_prompt,
            true_cfg_scale=true_cfg_scale,
            height=height,
            width=width,
            steps=steps,
            guidance=guidance,
            seed=seed,
            lora=lora,
            format=format,
            priority=priority,
            task_id=task_id or uuid.uuid4().hex,
        )
        return self._infer(call, timeout, generated_image)

    def rerank(
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
        if top_n is not None and top_n < 1:
            raise InvalidInput(f"top_n is {top_n}; allowed: at least 1")
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
        return self._infer(call, timeout, lambda outputs: ranking(outputs, documents, top_n))

    def task(self, task_id: str) -> TaskStatus:
        """Return a task's state, progress and preview.

        Args:
            task_id: The `task_id` given to `generate` or `rerank`.

        Raises:
            GenServeError: See `genserve.errors`. An id that no server has is no error; its state is ``unknown``.
        """
        deadline = Deadline(self._timeout)
        return self._with_retries(deadline, lambda: tasks.find(self._servers, task_id, deadline))

    def cancel(self, task_id: str) -> TaskStatus:
        """Cancel a task and return its state at that moment. Its own caller gets `Cancelled`.

        A running task ends at its next step. A task in Triton's queue, which `tasks` cannot see, ends as soon as it
        leaves the queue. A task that has ended is unchanged.

        Args:
            task_id: The `task_id` given to `generate` or `rerank`.

        Raises:
            GenServeError: See `genserve.errors`.
        """
        deadline = Deadline(self._timeout)
        return self._with_retries(deadline, lambda: tasks.cancel(self._servers, task_id, deadline))

    def health(self) -> bool:
        """Return whether at least one server has all of its models ready."""
        return any(probe(server.ready) for server in self._servers)

    def status(self) -> list[ServerStatus]:
        """Return each server's state. An unreachable server is listed with ``live=False``."""
        return [server_status(server) for server in self._servers]

    def models(self) -> list[ModelStatus]:
        """Return the models of the first reachable server.

        Raises:
            ServerUnavailable: No server is reachable.
        """

        def ask(index: int) -> list[ModelStatus]:
            with located(url=self._servers[index].url):
                return model_statuses(self._servers[index])

        return self._try_servers(range(len(self._servers)), ask)

    def _infer(self, call: Call, timeout: float | None, parse: Callable[[Outputs], T]) -> T:
        deadline = Deadline(self._timeout if timeout is None else timeout)

        def send(index: int) -> T:
            remaining_s = deadline.left()
            with self._lock:
                self._in_flight[index] += 1
            try:
                with located(url=self._servers[index].url):
                    return parse(self._servers[index].infer(call, remaining_s))
            finally:
                with self._lock:
                    self._in_flight[index] -= 1

        with located(model=call.model, request_id=call.request_id):
            return self._with_retries(deadline, lambda: self._try_servers(self._by_load(), send))

    def _with_retries(self, deadline: Deadline, attempt: Callable[[], T]) -> T:
        """Return the result of the first attempt that a server accepts."""
        retries = Retries(self._retry_for, deadline)
        while True:
            try:
                return attempt()
            except (ServerUnavailable, QueueFull) as error:
                pause = retries.pause_after(error)
                if pause is None:
                    raise
            time.sleep(pause)

    def _by_load(self) -> list[int]:
        """Return the server indices, least busy first. Equally busy servers take turns."""
        with self._lock:
            count, turn = len(self._servers), next(self._turn)
            return sorted(range(count), key=lambda index: (self._in_flight[index], (index - turn) % count))

    @staticmethod
    def _try_servers(order: Sequence[int], ask: Callable[[int], T]) -> T:
        """Return the answer of the first server that accepts the request."""
        refusals: list[ServerUnavailable | QueueFull] = []
        for index in order:
            try:
                return ask(index)
            except (ServerUnavailable, QueueFull) as error:
                refusals.append(error)
        raise _most_helpful(refusals)


def _most_helpful(refusals: Sequence[ServerUnavailable | QueueFull]) -> ServerUnavailable | QueueFull:
    """Return the most helpful refusal: the shortest `retry_after`, else a full queue, else the last failure."""
    full = [error for error in refusals if isinstance(error, QueueFull)]
    retryable = [error for error in full if error.retry_after is not None]
    if retryable:
        return min(retryable, key=lambda error: error.retry_after or 0.0)
    return full[0] if full else refusals[-1]
