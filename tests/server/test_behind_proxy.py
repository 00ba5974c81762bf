"""The client behind a real nginx: TLS, an API key, a rate limit, and a restart of the server behind it."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import PROTOCOLS, Server, wait_until
from nginx import KEY, MAX_BODY_MB, Nginx, running_nginx

from genserve import (
    TLS,
    Cancelled,
    Client,
    DeadlineExceeded,
    GenServeError,
    InvalidInput,
    NotAllowed,
    OutOfMemory,
    QueueFull,
    ServerError,
    ServerUnavailable,
)

LONG = {"steps": 100, "height": 320, "width": 320, "seed": 4}
HTTP_PATH, GRPC_PATH = "/genserve/", "/inference.GRPCInferenceService/"


@pytest.fixture(scope="module")
def proxy(running_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with running_nginx(
        tmp_path_factory.mktemp("nginx"), http_port=running_server.ports[0], grpc_port=running_server.ports[1]
    ) as nginx:
        yield nginx


@pytest.fixture(params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def client(proxy: Nginx, server: Server, protocol: str) -> Iterator[Client]:
    with proxy.client(protocol, timeout=120) as client:
        yield client


def test_all_calls_work_over_tls_with_the_key(client: Client) -> None:
    assert client.health()
    (status,) = client.status()
    assert (status.live, status.ready, status.error) == (True, True, "")
    assert {model.name for model in client.models()} == {"flux", "rerank", "tasks"}
    assert client.generate("a red circle", steps=2, seed=1).seed == 1
    assert client.rerank("capital of France", ["Berlin", "Paris is the capital of France"])[0].index == 1
    assert client.task("nobody's").state == "unknown"


@pytest.mark.parametrize("headers", [None, {"Authorization": "Bearer wrong"}], ids=["no-key", "wrong-key"])
def test_wrong_key_is_rejected(proxy: Nginx, server: Server, protocol: str, headers: dict[str, str] | None) -> None:
    with proxy.client(protocol, headers=headers, retry_for=30) as client:
        started = time.monotonic()
        with pytest.raises(NotAllowed, match=proxy.url(protocol)) as caught:
            client.rerank("q", ["a"], task_id="mine")
        assert time.monotonic() - started < 10
        assert (caught.value.url, caught.value.model, caught.value.request_id) == (
            proxy.url(protocol),
            "rerank",
            "mine",
        )
        with pytest.raises(NotAllowed):
            client.models()
        assert not client.health()
        (status,) = client.status()
        assert status.error.startswith("NotAllowed: ")
        assert "wrong" not in f"{caught.value} {status.error}"


def test_certificate_of_an_unknown_authority_is_rejected(proxy: Nginx, server: Server, protocol: str) -> None:
    with proxy.client(protocol, tls=None, timeout=20) as client, pytest.raises(ServerUnavailable, match="(?i)certif"):
        client.rerank("q", ["a"])


def test_http_works_without_verification(proxy: Nginx, server: Server) -> None:
    with pytest.warns(RuntimeWarning, match="not verified"), proxy.client("http", tls=TLS(verify=False)) as client:
        assert client.rerank("q", ["a"])


def test_client_certificate_is_sent(proxy: Nginx, server: Server, protocol: str) -> None:
    with proxy.client(protocol, "mutual", tls=proxy.callers_tls) as client:
        assert client.rerank("q", ["a"])
    with proxy.client(protocol, "mutual") as client, pytest.raises(InvalidInput, match="400"):
        client.rerank("q", ["a"])


def first_rejection(client: Client) -> QueueFull:
    """Send requests until one is rejected."""

    def refused() -> QueueFull | None:
        try:
            client.rerank("q", ["a"])
        except QueueFull as error:
            return error
        return None

    refusal: QueueFull = wait_until(refused, what="one request too many")
    return refusal


@pytest.mark.parametrize(
    ("protocol", "door"), [("http", "limited"), ("grpc", "limited_grpc")], ids=PROTOCOLS[::-1], indirect=False
)
def test_rate_limited_requests_retry_after_the_given_time(
    proxy: Nginx, server: Server, protocol: str, door: str
) -> None:
    with proxy.client(protocol, door) as client:
        assert first_rejection(client).retry_after == 1.0
    with proxy.client(protocol, door, retry_for=60) as client, ThreadPoolExecutor(3) as pool:
        assert all(pool.map(lambda _: client.rerank("q", ["a"]), range(3)))


def test_grpc_hides_retry_after_of_a_plain_http_response(proxy: Nginx, server: Server) -> None:
    with proxy.client("grpc", "limited", retry_for=30) as client:
        assert first_rejection(client).retry_after is None


def test_large_message_passes(client: Client) -> None:
    with pytest.raises(InvalidInput, match="PROMPT is 9,000,000 characters long"):
        client.generate("x" * 9_000_000)


def test_message_above_the_proxys_limit_is_invalid_input(client: Client) -> None:
    with pytest.raises(InvalidInput, match="413"):
        client.generate("x" * (MAX_BODY_MB + 1) * 2**20)


def test_wrong_prefix_is_invalid_input(proxy: Nginx, server: Server) -> None:
    url = proxy.url("http").replace("/genserve", "/elsewhere")
    client = Client(url, tls=proxy.tls, headers={"Authorization": KEY})
    with client, pytest.raises(InvalidInput, match="404"):
        client.rerank("q", ["a"])


def test_running_task_is_listed_and_cancelled(client: Client, protocol: str) -> None:
    task_id = f"proxied-{protocol}-{time.monotonic_ns()}"
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.generate, "unwanted", task_id=task_id, **LONG)
        running = wait_until(lambda: _running(client, task_id), what="the request to run")
        assert (running.model, running.steps) == ("flux", 100)
        assert 0 < running.progress < 1
        assert client.cancel(task_id).is_in_flight
        with pytest.raises(Cancelled) as caught:
            future.result(30)
    assert (caught.value.request_id, caught.value.model) == (task_id, "flux")
    assert client.task(task_id).state == "cancelled"


def _running(client: Client, task_id: str) -> Any:
    task = client.task(task_id)
    return task if task.state == "running" and task.step > 0 else None


def test_client_timeout_reaches_the_server(proxy: Nginx, server: Server, protocol: str) -> None:
    task_id = f"late-{protocol}-{time.monotonic_ns()}"
    with proxy.client(protocol, timeout=1.0) as client, pytest.raises(DeadlineExceeded):
        client.generate("too long", task_id=task_id, **LONG)
    with proxy.client(protocol) as client:
        ended = wait_until(lambda: _ended(client, task_id), timeout_s=10, what="the server to give it up")
    assert (ended.state, ended.error.partition(":")[0]) in {("failed", "DeadlineExceeded"), ("cancelled", "Cancelled")}
    assert ended.step < ended.steps


def _ended(client: Client, task_id: str) -> Any:
    task = client.task(task_id)
    return None if task.is_in_flight or task.state == "unknown" else task


# A server that dies behind the proxy.


class Load:
    """Callers that send requests until they are stopped, and keep all responses."""

    def __init__(self, pool: ThreadPoolExecutor, requests: list[Callable[[], Any]]) -> None:
        self._stop = threading.Event()
        self._callers: list[Future[list[Any]]] = [pool.submit(self._go_on, request) for request in requests]

    def _go_on(self, request: Callable[[], Any]) -> list[Any]:
        found = []
        while not self._stop.is_set():
            found.append(request())
        return found

    def stop(self) -> list[list[Any]]:
        self._stop.set()
        return [caller.result(120) for caller in self._callers]


def test_all_requests_succeed_during_a_restart(proxy: Nginx, server: Server) -> None:
    documents = ["Berlin", "Paris is the capital of France", "rain"]

    def image(client: Client) -> bytes:
        return client.generate("a red circle", steps=4, seed=7).data

    def scores(client: Client) -> list[float]:
        return [round(score, 4) for score in client.rerank("capital of France", documents).scores]

    with (
        proxy.client("http", retry_for=90, timeout=120) as http,
        proxy.client("grpc", retry_for=90, timeout=120) as grpc_,
        ThreadPoolExecutor(8) as pool,
    ):
        expected = [image(grpc_), scores(grpc_)]
        load = Load(
            pool, [lambda ask=ask, client=client: ask(client) for ask in (image, scores) for client in (http, grpc_)]
        )
        try:
            for victim in (lambda: server.process.children()[0], lambda: server.stub("rerank")):
                time.sleep(1.0)
                process = victim()
                process.send_signal(signal.SIGKILL)
                wait_until(lambda: not process.is_running(), what="the process to end")  # noqa: B023
                time.sleep(0.5)
                server.wait_ready()
            time.sleep(1.0)
        finally:
            images_http, images_grpc, scores_http, scores_grpc = load.stop()
    for found, right in ((images_http + images_grpc, expected[0]), (scores_http + scores_grpc, expected[1])):
        assert len(found) > 4
        assert all(answer == right for answer in found)
    assert proxy.answers(502, HTTP_PATH)
    assert proxy.answers(502, GRPC_PATH)


# Errors that the server words, by an upstream that fails as it is told.

FAILURE = "x-fail"
"""Request header with the status and message to return."""


class FailingHttp(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        code, _, message = self.headers[FAILURE].partition(" ")
        body = json.dumps({"error": message}).encode()
        self.send_response({"INTERNAL": 500, "UNAVAILABLE": 503, "INVALID_ARGUMENT": 400, "CANCELLED": 400}[code])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        pass


class FailingGrpc(grpc.GenericRpcHandler):
    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        code, _, message = dict(call.invocation_metadata)[FAILURE].partition(" ")
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: context.abort(getattr(grpc.StatusCode, code), message)
        )


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with ThreadPoolExecutor(2) as pool, ThreadingHTTPServer(("127.0.0.1", 0), FailingHttp) as http_server:
        grpc_server = grpc.server(pool, handlers=[FailingGrpc()])
        grpc_port = grpc_server.add_insecure_port("127.0.0.1:0")
        grpc_server.start()
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        try:
            folder: Path = tmp_path_factory.mktemp("failing")
            with running_nginx(folder, http_port=http_server.server_port, grpc_port=grpc_port) as nginx:
                yield nginx
        finally:
            grpc_server.stop(0).wait(10)
            http_server.shutdown()


@pytest.mark.parametrize(
    ("code", "message", "kind", "text"),
    [
        (
            "INVALID_ARGUMENT",
            "InvalidInput: STEPS is 0; allowed: 1 to 100",
            InvalidInput,
            "STEPS is 0; allowed: 1 to 100",
        ),
        ("UNAVAILABLE", "Exceeds maximum queue size", QueueFull, "Exceeds maximum queue size"),
        ("UNAVAILABLE", "DeadlineExceeded: ran 2 s", DeadlineExceeded, "ran 2 s"),
        ("UNAVAILABLE", "OutOfMemory: too large", OutOfMemory, "too large"),
        ("CANCELLED", "Cancelled: by tasks", Cancelled, "by tasks"),
        ("INTERNAL", "ServerError: the worker died 2 times", ServerError, "the worker died 2 times"),
        ("INTERNAL", "ServerUnavailable: the stub ended", ServerUnavailable, "the stub ended"),
        ("INTERNAL", "Stub process 'rerank_0_0' is not healthy.", ServerUnavailable, "is not healthy"),
    ],
    ids=[
        "InvalidInput",
        "QueueFull",
        "DeadlineExceeded",
        "OutOfMemory",
        "Cancelled",
        "ServerError",
        "named-SU",
        "stub",
    ],
)
def test_server_messages_pass_unchanged(
    failing: Nginx, protocol: str, code: str, message: str, kind: type[GenServeError], text: str
) -> None:
    headers = {"Authorization": KEY, FAILURE: f"{code} {message}"}
    with failing.client(protocol, headers=headers) as client, pytest.raises(kind) as caught:
        client.rerank("q", ["a"])
    assert type(caught.value) is kind
    assert text in str(caught.value)
    assert caught.value.url == failing.url(protocol)
