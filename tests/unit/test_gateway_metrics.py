"""Metrics of the gateway, its log lines, and the trace context that it passes on."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_servers import FakeServer, after
from gateway_app import RERANK, gateway, with_gateway
from prometheus_client.parser import text_string_to_metric_families
from starlette.datastructures import Headers

from genserve.errors import ServerUnavailable
from genserve.gateway.keys import digest_of
from genserve.gateway.logs import LogfmtFormatter
from genserve.gateway.metrics import Metrics
from genserve.gateway.trace import TraceContext
from genserve.protocol import Call, Outputs
from genserve.wire import all_headers

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
TRACE = PARENT.split("-")[1]

# Metrics.


async def samples(http: httpx.AsyncClient) -> dict[tuple[str, tuple[str, ...]], float]:
    """Return the values of the metrics by name and labels, the latter as sorted values."""
    text = (await http.get("/metrics")).text
    return {
        (sample.name, tuple(value for name, value in sorted(sample.labels.items()) if name != "le")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


def test_requests_are_counted_by_route_method_and_status() -> None:
    async def ask(http: httpx.AsyncClient) -> None:
        key = {"x-api-key": "a"}
        for task_id in ("one", "two", "../three"):
            await http.get(f"/task/{task_id}", headers=key)
        await http.post("/v2/rerank", json=RERANK, headers=key)
        await http.post("/v2/rerank", json={}, headers=key)
        await http.post("/v2/rerank", json=RERANK)
        await http.request("PUT", "/status", headers=key)
        for number in range(3):
            await http.request(f"MADE{number}", f"/up/{number}", headers=key)
        http.headers.update(key)
        found = await samples(http)
        name = "genserve_gateway_requests_total"
        counted = {labels: value for (sample, labels), value in found.items() if sample == name}
        assert counted == {
            ("GET", "/task/{task_id}", "200"): 2,
            ("GET", "other", "404"): 1,  # /three
            ("POST", "/v2/rerank", "200"): 1,
            ("POST", "/v2/rerank", "401"): 1,
            ("POST", "/v2/rerank", "422"): 1,
            ("PUT", "/status", "405"): 1,
            ("other", "other", "404"): 3,
        }
        assert found["genserve_gateway_request_seconds_count", ("/v2/rerank",)] == 3
        assert found["genserve_gateway_in_flight", ()] == 1, "the request for the metrics"
        assert found["process_resident_memory_bytes", ()] > 10**7

    with_gateway(ask, keys=f"alice {digest_of('a')}")


def test_two_gateways_count_apart() -> None:
    async def ask(http: httpx.AsyncClient) -> float:
        await http.get("/status")
        return (await samples(http))["genserve_gateway_requests_total", ("GET", "/status", "200")]

    assert [with_gateway(ask), with_gateway(ask)] == [1, 1]


async def hang_up(http: httpx.AsyncClient, method: str, path: str, body: bytes) -> None:
    """Send a request whose caller goes away at once."""
    transport: Any = http._transport
    messages = iter([{"type": "http.request", "body": body}, {"type": "http.disconnect"}])

    async def receive() -> dict[str, Any]:
        return next(messages)

    async def send(message: dict[str, Any]) -> None:
        assert message.get("status", 499) == 499

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}
    await transport.app(scope, receive, send)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [("POST", "/v2/rerank", b'{"query": "q", "documents": ["a"]}'), ("GET", "/health", b"")],
)
def test_disconnect_is_counted_and_logged(
    method: str, path: str, body: bytes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(model: str = "") -> bool:
        await asyncio.sleep(60)
        return True

    async def ask() -> None:
        server = FakeServer()
        server.always = after(60)
        monkeypatch.setattr(server, "ready", slow)
        async with gateway(server) as http:
            await hang_up(http, method, path, body)
            found = await samples(http)
        assert found["genserve_gateway_disconnects_total", (path,)] == 1
        assert found["genserve_gateway_requests_total", (method, path, "499")] == 1
        assert server.running == 0
        gc.collect()  # a forgotten exception would be logged now

    with caplog.at_level(logging.DEBUG, logger="genserve"):
        asyncio.run(ask())
    (fields,) = [record.fields for record in caplog.records if getattr(record, "fields", {}).get("gone")]
    assert (fields["route"], fields["status"]) == (path, 499)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_metrics_are_those_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "gateway.md").read_text()
    documented = set(re.findall(r"^\| `(genserve_gateway_\w+)` \|", page, flags=re.MULTILINE))
    families = [family for family in Metrics().registry.collect() if family.name.startswith("genserve")]
    assert {family.name + ("_total" if family.type == "counter" else "") for family in families} == documented


# Log lines.


def test_every_request_has_one_line(caplog: pytest.LogCaptureFixture) -> None:
    async def ask(http: httpx.AsyncClient) -> None:
        headers = {"x-request-id": "mine", "traceparent": PARENT, "x-api-key": "a"}
        await http.post("/v2/rerank", json=RERANK, headers=headers)
        await http.get("/health")

    with caplog.at_level(logging.INFO, logger="genserve"):
        with_gateway(ask, keys=f"alice {digest_of('a')}")
    (record,) = caplog.records
    line = LogfmtFormatter().format(record)
    assert re.sub(r"(time|pid|seconds)=\S+", r"\1=...", line) == (
        'time=... level=info logger=genserve.gateway.metrics pid=... event="request done" task_id=mine'
        f" trace_id={TRACE} route=/v2/rerank method=POST status=200 seconds=... key=alice"
    )


def test_defect_is_a_500_with_a_traceback_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    server = FakeServer()
    server.always = ZeroDivisionError("a defect")
    answer = with_gateway(lambda http: http.post("/v2/rerank", json=RERANK, headers={"x-request-id": "mine"}), server)
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine")
    assert answer.json() == {
        "id": "mine",
        "message": "the gateway failed; its log says why",
        "detail": "the gateway failed; its log says why",
    }
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.fields["task_id"] == "mine"
    assert "ZeroDivisionError: a defect" in LogfmtFormatter().format(record)


# The trace context.


def context(**headers: str) -> dict[str, str]:
    return TraceContext.of(Headers(headers)).headers


@pytest.mark.parametrize("parent", [PARENT, f"{PARENT[:-2]}00", f"cc{PARENT[2:]}", f"cc{PARENT[2:]}-what-else"])
def test_valid_context_is_passed_on_unchanged(parent: str) -> None:
    assert context(traceparent=parent) == {"traceparent": parent}
    headers = {"traceparent": parent, "tracestate": "a=1,b=2"}
    assert context(**headers) == headers
    assert TraceContext.of(Headers(headers)).trace_id == TRACE


@pytest.mark.parametrize(
    "parent",
    [
        "",
        PARENT.upper(),
        f"ff{PARENT[2:]}",
        f"{PARENT}-more",
        f"{PARENT}\n",
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}-00f067aa0ba902b7-01",
        f"{PARENT[:-2]}0x",
    ],
)
def test_invalid_context_is_replaced(parent: str) -> None:
    found = [context(traceparent=parent, tracestate="a=1") for _ in range(2)]
    for each in found:
        assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-00", each["traceparent"])
        assert list(each) == ["traceparent"]
    assert found[0] != found[1]


def test_two_contexts_are_none() -> None:
    headers = Headers(raw=[(b"traceparent", PARENT.encode())] * 2)
    assert TraceContext.of(headers).trace_id != TRACE


@pytest.mark.parametrize(
    ("values", "state"),
    [(["a=1", "b=2"], "a=1,b=2"), (["a=" + "x" * 600], None), (["a=\xe4"], None), (["a=\x00"], None)],
    ids=["two-headers", "long", "not-ascii", "control-character"],
)
def test_unusable_state_is_dropped(values: list[str], state: str | None) -> None:
    raw = [(b"traceparent", PARENT.encode()), *((b"tracestate", value.encode("latin-1")) for value in values)]
    assert TraceContext.of(Headers(raw=raw)).headers.get("tracestate") == state


class TracedServer(FakeServer):
    """Server that notes the headers of every request that a transport would send."""

    def __init__(self, **options: Any) -> None:
        super().__init__("fake", **options)
        self.traces: list[tuple[str, str | None]] = []

    def _note(self, verb: str) -> None:
        self.traces.append((verb, all_headers({}).get("traceparent")))

    async def infer(self, call: Call, timeout_s: float) -> Outputs:
        self._note(call.model)
        return await super().infer(call, timeout_s)

    async def ready(self, model: str = "") -> bool:
        self._note("ready")
        return await super().ready(model)

    async def live(self) -> bool:
        self._note("live")
        return await super().live()

    async def metadata(self) -> dict[str, Any]:
        self._note("metadata")
        return await super().metadata()


@pytest.mark.parametrize(
    ("method", "path", "body", "least"),
    [
        ("POST", "/v2/rerank", RERANK, {"rerank"}),
        ("POST", "/v1/images/generations", {"prompt": "x", "n": 2}, {"flux"}),
        ("POST", "/v1/images/generations", {"prompt": "x", "stream": True}, {"flux"}),
        ("GET", "/status", None, {"metadata", "tasks", "ready"}),
        ("GET", "/health", None, {"ready"}),
        ("GET", "/task/x", None, {"tasks"}),
    ],
)
def test_every_request_to_a_server_has_the_callers_context(
    method: str, path: str, body: dict[str, Any] | None, least: set[str]
) -> None:
    server = TracedServer()
    with_gateway(lambda http: http.request(method, path, json=body, headers={"traceparent": PARENT}), server)
    assert {verb for verb, _ in server.traces} >= least
    assert {trace for _, trace in server.traces} == {PARENT}


def test_caller_without_context_gets_one_of_its_own() -> None:
    server = TracedServer()

    async def ask(http: httpx.AsyncClient) -> None:
        for _ in range(2):
            await http.post("/v2/rerank", json=RERANK)

    with_gateway(ask, server)
    assert len(set(server.traces)) == 2
    assert None not in dict(server.traces).values()


def test_cancellation_belongs_to_the_trace_and_probes_do_not() -> None:
    server = TracedServer()

    async def ask(http: httpx.AsyncClient) -> None:
        headers = {"traceparent": PARENT}
        server.script = [ServerUnavailable("gone")]
        await http.post("/v2/rerank", json=RERANK, headers=headers)
        while ("ready", None) not in server.traces:
            await asyncio.sleep(0.05)
        server.always = after(60)
        leaving = asyncio.ensure_future(http.post("/v2/rerank", json=RERANK, headers=headers))
        while not server.running:
            await asyncio.sleep(0.05)
        leaving.cancel()
        while not server.tasks:
            await asyncio.sleep(0.05)

    with_gateway(ask, server)
    assert set(server.traces) == {("rerank", PARENT), ("tasks", PARENT), ("ready", None)}
