"""The synchronous client."""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

from genserve.errors import DeadlineExceeded, GenServeError, InvalidInput, QueueFull, ServerUnavailable
from genserve.protocol import (
    Call,
    Outputs,
    generate_call,
    generated_image,
    ranking,
    rerank_call,
    task_answer,
    tasks_call,
)
from genserve.transport import Transport, connect
from genserve.types import GeneratedImage, ModelStatus, RankedDocument, ServerStatus

DEFAULT_URL = "localhost:8001"
DEFAULT_TIMEOUT_S = 600.0
"""More than the server lets a request wait and run; never for ever, which is tritonclient's default over gRPC."""
TASKS_TIMEOUT_S = 10.0
"""For `tasks`, which answers at once where it answers at all."""
RETRY_PAUSE_S = 0.25

T = TypeVar("T")


class Client:
    """Talks to one GenServe server, or spreads requests over several. Thread-safe.

    Requests go to the server with the fewest of this client's requests under way. One that a server cannot take
    (unreachable, or its queue is full) goes to the others in turn: requests are pure functions of their inputs.

    Args:
        url: ``host:port`` for gRPC, ``http://host:port`` for HTTP, or a list of such.
        timeout: Seconds that a call may take in all, where the call does not say otherwise.
        retry_for: Seconds to go on trying while no server can be reached; 0 fails at once.
    """

    def __init__(
        self, url: str | Sequence[str] = DEFAULT_URL, *, timeout: float = DEFAULT_TIMEOUT_S, retry_for: float = 0.0
    ) -> None:
        urls = [url] if isinstance(url, str) else list(url)
        if not urls:
            raise InvalidInput("url is an empty list; allowed: at least one address")
        self._timeout = _checked_timeout(timeout)
        self._retry_for = retry_for
        self._servers = [connect(each) for each in urls]
        self._under_way = dict.fromkeys(range(len(urls)), 0)
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
        format: str | None = None,  # noqa: A002  # the tensor's name
        priority: str = "normal",
        timeout: float | None = None,
        task_id: str | None = None,
    ) -> GeneratedImage:
        """Make an image. What is None keeps the checkpoint's default.

        Args:
            prompt: 1 to 10,000 characters.
            negative_prompt: What the image should not show; turns on true classifier-free guidance.
            true_cfg_scale: Its scale, 1 to 20.
            height: Pixels, a multiple of 16, at least 64.
            width: The same.
            steps: Denoising steps, 1 to 100.
            guidance: Guidance scale, 0 to 20.
            seed: 0 to 2**63 - 1; the same seed gives the same image.
            lora: Adapters, as ``{"name": str, "weight": float}``.
            format: ``png``, ``jpeg`` or ``webp``.
            priority: ``high``, ``normal`` or ``low``.
            timeout: Seconds that the call may take in all.
            task_id: An id of one's own, for progress, cancellation and the server's log.

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
            timeout=timeout,
            task_id=task_id or uuid.uuid4().hex,
        )
        return generated_image(self._infer(call, timeout))

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        instruction: str | None = None,
        windows: int = 1,
        priority: str = "normal",
        timeout: float | None = None,
    ) -> list[RankedDocument]:
        """Score documents against a query, and sort them by relevance.

        Args:
            query: 1 to 10,000 characters.
            documents: 1 to 1,000 texts.
            top_n: How many to return; None for all.
            instruction: The task instruction of instruction-tuned rerankers; None for the model's own.
            windows: Overlapping parts, 1 to 64, in which a document beyond the model's length limit is read at most;
                its score is the highest of theirs. 1 cuts it at the limit.
            priority: ``high``, ``normal`` or ``low``.
            timeout: Seconds that the call may take in all.

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
            timeout=timeout,
            request_id=uuid.uuid4().hex,
        )
        return ranking(self._infer(call, timeout), documents, top_n)

    def health(self) -> bool:
        """Whether at least one server is ready to serve every one of its models."""
        return any(_answers(server.ready) for server in self._servers)

    def status(self) -> list[ServerStatus]:
        """Each server's state; one that cannot be reached is listed as not live."""
        return [_status(server) for server in self._servers]

    def models(self) -> list[ModelStatus]:
        """The models of the first server that can be reached.

        Raises:
            ServerUnavailable: None can.
        """
        return self._try_servers(range(len(self._servers)), lambda index: _models(self._servers[index]))

    def _infer(self, call: Call, timeout: float | None) -> Outputs:
        deadline = time.monotonic() + (self._timeout if timeout is None else _checked_timeout(timeout))
        give_up = min(deadline, time.monotonic() + self._retry_for)

        def send(index: int) -> Outputs:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise DeadlineExceeded("no server answered in time")
            with self._lock:
                self._under_way[index] += 1
            try:
                return self._servers[index].infer(call, remaining_s)
            finally:
                with self._lock:
                    self._under_way[index] -= 1

        while True:
            try:
                return self._try_servers(self._by_load(), send)
            except ServerUnavailable:
                if time.monotonic() + RETRY_PAUSE_S >= give_up:
                    raise
                time.sleep(RETRY_PAUSE_S)

    def _by_load(self) -> list[int]:
        """Servers, the least busy first; equally busy ones take turns."""
        with self._lock:
            count, turn = len(self._servers), next(self._turn)
            return sorted(range(count), key=lambda index: (self._under_way[index], (index - turn) % count))

    @staticmethod
    def _try_servers(order: Sequence[int], ask: Callable[[int], T]) -> T:
        """The answer of the first server that can take the question."""
        refusals: list[ServerUnavailable | QueueFull] = []
        for index in order:
            try:
                return ask(index)
            except (ServerUnavailable, QueueFull) as error:
                refusals.append(error)
        # That a server is full says more than that another one is down.
        raise next((error for error in refusals if isinstance(error, QueueFull)), refusals[-1])


def _checked_timeout(timeout: float) -> float:
    if not 0 < timeout < float("inf"):
        raise InvalidInput(f"timeout is {timeout}; allowed: seconds, above 0")
    return timeout


def _answers(ask: Callable[[], bool]) -> bool:
    try:
        return ask()
    except GenServeError:
        return False


def _status(server: Transport) -> ServerStatus:
    try:
        version = str(server.metadata().get("version", ""))
        models = _models(server)
    except GenServeError:
        return ServerStatus(server.url, live=False, ready=False, version="", models=(), tasks=())
    try:
        tasks = task_answer(server.infer(tasks_call("list"), TASKS_TIMEOUT_S))
    except GenServeError:
        tasks = []  # a repository without `tasks`, or one that is still loading
    return ServerStatus(
        server.url, live=True, ready=_answers(server.ready), version=version, models=tuple(models), tasks=tuple(tasks)
    )


def _models(server: Transport) -> list[ModelStatus]:
    statistics = {entry["name"]: entry.get("inference_stats", {}) for entry in server.statistics()}
    return [_model(entry, statistics.get(entry["name"], {})) for entry in server.models()]


def _model(entry: dict[str, Any], statistics: dict[str, Any]) -> ModelStatus:
    def counter(name: str, field: str) -> int:
        return int(statistics.get(name, {}).get(field, 0))

    queued = counter("queue", "count")
    return ModelStatus(
        name=entry["name"],
        version=str(entry.get("version", "")),
        state=str(entry.get("state", "")),
        reason=str(entry.get("reason", "")),
        succeeded=counter("success", "count"),
        failed=counter("fail", "count"),
        queue_s=counter("queue", "ns") / queued / 1e9 if queued else 0.0,
    )
