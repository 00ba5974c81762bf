"""Transports against minimal HTTP and gRPC servers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import numpy as np
import pytest
from blocking import BlockingTransport
from tritonclient.grpc import service_pb2 as messages

from genserve import (
    Cancelled,
    DeadlineExceeded,
    GenServeError,
    InvalidInput,
    NotAllowed,
    QueueFull,
    ServerError,
    ServerUnavailable,
)
from genserve import grpc_transport as grpc_module
from genserve.background import LOOP
from genserve.protocol import Call
from genserve.wire import passing_on

HEADERS = {"Authorization": "Bearer right", "X-Tenant": "a"}
CALL = Call("rerank", {"QUERY": np.array([[b"q"]], dtype=np.object_)}, ("SCORES",), priority=1, request_id="mine")
SCORES = {"name": "SCORES", "datatype": "FP32", "shape": [1, 1], "data": [0.5]}


class HttpServer(ThreadingHTTPServer):
    """HTTP server that records requests and answers like Triton, or as configured."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HttpHandler)
        self.seen: list[tuple[str, str, Mapping[str, str], bytes]] = []
        self.answer: tuple[int, dict[str, str], bytes] | None = None


class HttpHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HttpServer

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.command, self.path, self.headers, body))
        status, headers, content = self.server.answer or (200, {}, json.dumps(self.good_answer()).encode())
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = answer  # noqa: N815

    def good_answer(self) -> Any:
        if self.path.endswith("/index"):
            return [{"name": "rerank"}]
        if self.path.endswith("/stats"):
            return {"model_stats": [{"name": "rerank"}]}
        if self.path.endswith("/infer"):
            return {"model_name": "rerank", "outputs": [SCORES]}
        return {"version": "2.55.0"}

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        pass


@pytest.fixture
def http_server() -> Iterator[HttpServer]:
    with HttpServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def http(http_server: HttpServer) -> Iterator[BlockingTransport]:
    transport = BlockingTransport(f"http://127.0.0.1:{http_server.server_port}/team", headers=HEADERS)
    yield transport
    transport.close()


Verb = Callable[[BlockingTransport], Any]
VERBS: dict[str, Verb] = {
    "infer": lambda transport: transport.infer(CALL, 2.5)["SCORES"].item(),
    "live": lambda transport: transport.live(),
    "ready": lambda transport: transport.ready(),
    "metadata": lambda transport: transport.metadata()["version"],
    "models": lambda transport: [each["name"] for each in transport.models()],
    "statistics": lambda transport: [each["name"] for each in transport.statistics()],
}
RESULTS = {
    "infer": 0.5,
    "live": True,
    "ready": True,
    "metadata": "2.55.0",
    "models": ["rerank"],
    "statistics": ["rerank"],
}
PATHS = {
    "infer": "/team/v2/models/rerank/infer",
    "live": "/team/v2/health/live",
    "ready": "/team/v2/health/ready",
    "metadata": "/team/v2",
    "models": "/team/v2/repository/index",
    "statistics": "/team/v2/models/stats",
}


@pytest.mark.parametrize("verb", VERBS)
def test_http_sends_headers_and_prefix_with_every_request(
    verb: str, http: BlockingTransport, http_server: HttpServer
) -> None:
    assert VERBS[verb](http) == RESULTS[verb]
    ((_, path, headers, _),) = http_server.seen
    assert path == PATHS[verb]
    assert {name: headers[name] for name in HEADERS} == HEADERS


TRACE = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "tracestate": "a=1"}


async def passing_on_trace(transport: BlockingTransport) -> None:
    """Use every verb within a trace, and one of them again after it."""
    with passing_on(TRACE):
        await transport.transport.infer(CALL, 2.5)
        for name in ("live", "ready", "metadata", "models", "statistics"):
            await getattr(transport.transport, name)()
    await transport.transport.live()


def test_http_passes_on_headers(http: BlockingTransport, http_server: HttpServer) -> None:
    LOOP.run(passing_on_trace(http))
    seen = [{name: headers.get(name) for name in (*TRACE, "X-Tenant")} for _, _, headers, _ in http_server.seen]
    assert seen == [{**TRACE, "X-Tenant": "a"}] * 6 + [{**dict.fromkeys(TRACE), "X-Tenant": "a"}]


def test_http_sends_request_id_priority_and_timeout(http: BlockingTransport, http_server: HttpServer) -> None:
    http.infer(CALL, 2.5)
    ((_, _, headers, body),) = http_server.seen
    sent = json.loads(body[: int(headers["Inference-Header-Content-Length"])])
    assert sent["id"] == "mine"
    assert (sent["parameters"]["timeout"], sent["parameters"]["priority"]) == (2_500_000, 1)
    assert sent["parameters"]["priority_level"] == 1


@pytest.mark.parametrize(
    ("status", "content", "kind", "message"),
    [
        (400, b'{"error": "InvalidInput: STEPS is 0"}', InvalidInput, "^STEPS is 0$"),
        (400, b'{"error": "Cancelled: by tasks"}', Cancelled, "^by tasks$"),
        (401, b"<html>", NotAllowed, "^http://.*: HTTP status 401 Unauthorized$"),
        (403, b"", NotAllowed, "^http://.*: HTTP status 403 Forbidden$"),
        (404, b'{"error": "Request for unknown model: \'rerank\' is not found"}', ServerUnavailable, "unknown model"),
        (404, b"<html>", InvalidInput, "HTTP status 404 Not Found"),
        (413, b"<html>", InvalidInput, "413"),
        (429, b'{"error": {"message": "slow down"}}', QueueFull, "slow down"),
        (500, b"[request id: mine] x", ServerError, "500"),
        (
            500,
            b'{"error": "[request id: mine] Stub process \'a\' is not healthy."}',
            ServerUnavailable,
            ": Stub process",
        ),
        (502, b"<html>", ServerUnavailable, "502 Bad Gateway"),
        (503, b'{"error": "Exceeds maximum queue size"}', QueueFull, "^Exceeds maximum queue size$"),
        (503, b"", ServerUnavailable, "503"),
        (504, b"<html>", DeadlineExceeded, "504"),
        (302, b"", InvalidInput, "302 Found"),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_http_error_status_becomes_an_exception(
    status: int,
    content: bytes,
    kind: type[GenServeError],
    message: str,
    http: BlockingTransport,
    http_server: HttpServer,
) -> None:
    http_server.answer = (status, {"Location": "http://127.0.0.1:1/"}, content)
    with pytest.raises(kind, match=message) as caught:
        http.infer(CALL, 2.5)
    assert type(caught.value) is kind
    assert "Bearer" not in str(caught.value)


def test_http_passes_on_retry_after(http: BlockingTransport, http_server: HttpServer) -> None:
    http_server.answer = (429, {"Retry-After": "7"}, b"")
    with pytest.raises(QueueFull) as caught:
        http.infer(CALL, 2.5)
    assert caught.value.retry_after == 7.0


@pytest.mark.parametrize(
    "content",
    [b"<html>", b"[]", b"{}", b'{"model_name": "rerank", "outputs": []}', b""],
    ids=["html", "list", "no-outputs", "missing-output", "empty"],
)
def test_http_malformed_answer_is_a_server_error(
    content: bytes, http: BlockingTransport, http_server: HttpServer
) -> None:
    http_server.answer = (200, {}, content)
    with pytest.raises(ServerError, match="sent an answer that is not Triton's"):
        http.infer(CALL, 2.5)


def test_http_truncated_answer_is_server_unavailable(http: BlockingTransport, http_server: HttpServer) -> None:
    http_server.answer = (200, {"Content-Length": "100", "Connection": "close"}, b"{")
    with pytest.raises(ServerUnavailable):
        http.infer(CALL, 2.5)


@pytest.mark.parametrize(("status", "ready"), [(200, True), (400, False), (503, False)], ids=str)
def test_http_health_follows_the_status(
    status: int, ready: bool, http: BlockingTransport, http_server: HttpServer
) -> None:
    http_server.answer = (status, {}, b"")
    assert http.ready() is ready


@pytest.mark.parametrize("status", [401, 403])
def test_http_health_raises_not_allowed(status: int, http: BlockingTransport, http_server: HttpServer) -> None:
    http_server.answer = (status, {}, b"")
    with pytest.raises(NotAllowed):
        http.live()


class GrpcServer(grpc.GenericRpcHandler):
    """gRPC server that records requests and answers like Triton, or as configured."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Any], Any]] = []
        self.failure: tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]] | None = None
        self.release = threading.Event()
        self.release.set()
        self.ends: list[str] = []

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        name = call.method.rpartition("/")[2]

        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            self.seen.append((name, dict(call.invocation_metadata), request))
            while not self.release.wait(0.02):
                if not context.is_active():
                    self.ends.append("cancelled")
                    context.abort(grpc.StatusCode.CANCELLED, "")
            self.ends.append("answered")
            if self.failure:
                code, message, metadata = self.failure
                context.set_trailing_metadata(metadata)
                context.abort(code, message)
            return GRPC_ANSWERS[name]

        return grpc.unary_unary_rpc_method_handler(
            answer,
            request_deserializer=getattr(messages, f"{name}Request").FromString,
            response_serializer=lambda answer: answer.SerializeToString(),
        )


GRPC_ANSWERS = {
    "ModelInfer": messages.ModelInferResponse(
        model_name="rerank",
        outputs=[messages.ModelInferResponse.InferOutputTensor(name="SCORES", datatype="FP32", shape=[1, 1])],
        raw_output_contents=[np.float32(0.5).tobytes()],
    ),
    "ServerLive": messages.ServerLiveResponse(live=True),
    "ServerReady": messages.ServerReadyResponse(ready=True),
    "ServerMetadata": messages.ServerMetadataResponse(version="2.55.0"),
    "RepositoryIndex": messages.RepositoryIndexResponse(
        models=[messages.RepositoryIndexResponse.ModelIndex(name="rerank")]
    ),
    "ModelStatistics": messages.ModelStatisticsResponse(model_stats=[messages.ModelStatistics(name="rerank")]),
}


@pytest.fixture
def grpc_server() -> GrpcServer:
    return GrpcServer()


@pytest.fixture
def grpc_transport(grpc_server: GrpcServer) -> Iterator[BlockingTransport]:
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool, handlers=[grpc_server])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        transport = BlockingTransport(f"127.0.0.1:{port}", headers=HEADERS)
        yield transport
        transport.close()
        server.stop(0).wait(10)


@pytest.mark.parametrize("verb", VERBS)
def test_grpc_sends_headers_as_metadata_with_every_request(
    verb: str, grpc_transport: BlockingTransport, grpc_server: GrpcServer
) -> None:
    assert VERBS[verb](grpc_transport) == RESULTS[verb]
    ((_, metadata, _),) = grpc_server.seen
    assert (metadata["authorization"], metadata["x-tenant"]) == ("Bearer right", "a")


def test_grpc_passes_on_headers_as_metadata(grpc_transport: BlockingTransport, grpc_server: GrpcServer) -> None:
    LOOP.run(passing_on_trace(grpc_transport))
    seen = [{name: metadata.get(name) for name in (*TRACE, "x-tenant")} for _, metadata, _ in grpc_server.seen]
    assert seen == [{**TRACE, "x-tenant": "a"}] * 6 + [{**dict.fromkeys(TRACE), "x-tenant": "a"}]


@pytest.mark.parametrize(
    ("timeout_s", "microseconds"),
    [(2.5, 2_500_000), (0.25, 250_000), (240.0, 240_000_000), (1e8, 10**14)],
    ids=str,
)
def test_grpc_sends_request_id_priority_and_timeout(
    timeout_s: float, microseconds: int, grpc_transport: BlockingTransport, grpc_server: GrpcServer
) -> None:
    grpc_transport.infer(CALL, timeout_s)
    ((_, _, request),) = grpc_server.seen
    assert request.id == "mine"
    assert request.parameters["timeout"].int64_param == microseconds
    assert request.parameters["priority"].uint64_param == 1
    assert request.parameters["priority_level"].int64_param == 1


@pytest.mark.parametrize(
    ("code", "message", "kind"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, "no key", NotAllowed),
        (grpc.StatusCode.PERMISSION_DENIED, "wrong key", NotAllowed),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "slow down", QueueFull),
        (grpc.StatusCode.CANCELLED, "", ServerUnavailable),
        (grpc.StatusCode.CANCELLED, "Cancelled: by tasks", Cancelled),
        (grpc.StatusCode.INTERNAL, "Stub process 'a' is not healthy.", ServerUnavailable),
    ],
    ids=["no-key", "wrong-key", "slow-down", "server-ends", "cancelled", "stub"],
)
def test_grpc_error_status_becomes_an_exception(
    code: grpc.StatusCode,
    message: str,
    kind: type[GenServeError],
    grpc_transport: BlockingTransport,
    grpc_server: GrpcServer,
) -> None:
    grpc_server.failure = (code, message, ())
    with pytest.raises(kind) as caught:
        grpc_transport.infer(CALL, 2.5)
    assert type(caught.value) is kind


def test_grpc_passes_on_retry_after(grpc_transport: BlockingTransport, grpc_server: GrpcServer) -> None:
    grpc_server.failure = (grpc.StatusCode.RESOURCE_EXHAUSTED, "slow down", (("retry-after", "7"),))
    with pytest.raises(QueueFull) as caught:
        grpc_transport.infer(CALL, 2.5)
    assert caught.value.retry_after == 7.0


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("url", ["127.0.0.1:1", "http://127.0.0.1:1"], ids=["grpc", "http"])
def test_closed_port_is_server_unavailable(url: str, verb: str) -> None:
    transport = BlockingTransport(url)
    with pytest.raises(ServerUnavailable, match="127.0.0.1:1"):
        VERBS[verb](transport)
    transport.close()


async def give_up(transport: BlockingTransport, server: GrpcServer, how: str) -> None:
    """Give up a request that the server holds, by cancellation or by its deadline."""
    server.release.clear()
    infer = asyncio.ensure_future(transport.transport.infer(CALL, 0.2 if how == "deadline" else 30.0))
    while not server.seen:
        await asyncio.sleep(0.01)
    if how == "cancelled":
        infer.cancel()
    with pytest.raises((asyncio.CancelledError, DeadlineExceeded)):
        await infer


@pytest.mark.parametrize("how", ["cancelled", "deadline"])
def test_grpc_request_given_up_may_end_by_itself(
    how: str, grpc_transport: BlockingTransport, grpc_server: GrpcServer
) -> None:
    async def run() -> None:
        await give_up(grpc_transport, grpc_server, how)
        await asyncio.sleep(0.2)
        grpc_server.release.set()
        while not grpc_server.ends:
            await asyncio.sleep(0.01)

    LOOP.run(run())
    assert grpc_server.ends == ["answered"], "Triton may crash if it is cancelled over gRPC at such a moment"


@pytest.mark.parametrize("how", ["cancelled", "deadline"])
def test_grpc_request_given_up_does_not_stay_forever(
    how: str, grpc_transport: BlockingTransport, grpc_server: GrpcServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_module, "LINGER_S", 0.3)

    async def run() -> None:
        await give_up(grpc_transport, grpc_server, how)
        while not grpc_server.ends:
            await asyncio.sleep(0.01)

    LOOP.run(run())
    assert grpc_server.ends == ["cancelled"]


def test_closing_waits_a_moment_for_requests_given_up(
    grpc_transport: BlockingTransport, grpc_server: GrpcServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_module, "CLOSE_S", 30.0)

    async def run() -> None:
        await give_up(grpc_transport, grpc_server, "cancelled")
        asyncio.get_running_loop().call_later(0.2, grpc_server.release.set)
        await grpc_transport.transport.close()

    LOOP.run(run())
    assert grpc_server.ends == ["answered"]
