"""Load balancing, failover and retries over several fake servers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import genserve.retry
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
    TaskStatus,
    Transport,
)
from genserve.protocol import Call, Outputs

Answer = Callable[[], Outputs]


def score() -> Outputs:
    return {"SCORES": np.array([[0.5]], dtype=np.float32), "INFO": np.array([[b"{}"]], dtype=np.object_)}


class FakeServer:
    """Server that answers with the next entry of its script, then with a score."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.calls: list[Call] = []
        self.timeouts: list[float] = []
        self.script: list[Exception | Answer] = []
        self.always: Exception | None = None
        self.is_ready = True
        self.closed = False

    def infer(self, call: Call, timeout_s: float) -> Outputs:
        if call.model == "tasks" and call.inputs["ACTION"].item() == b"cancel":
            return {}  # the cancellation of a request that was given up
        self.calls.append(call)
        self.timeouts.append(timeout_s)
        answer = self.script.pop(0) if self.script else self.always or score
        if isinstance(answer, Exception):
            raise answer
        return answer()

    def live(self) -> bool:
        return self.ready()

    def ready(self) -> bool:
        if self.always:
            raise self.always
        return self.is_ready

    def metadata(self) -> dict[str, Any]:
        if self.always:
            raise self.always
        return {"version": "2.55.0"}

    def models(self) -> list[dict[str, Any]]:
        if self.always:
            raise self.always
        return [{"name": "flux", "version": "1", "state": "READY"}, {"name": "rerank", "state": "UNAVAILABLE"}]

    def statistics(self) -> list[dict[str, Any]]:
        # Counters are texts over gRPC, which leaves out those that are zero.
        queue = {"count": "4", "ns": "2000000000"}
        return [{"name": "flux", "inference_stats": {"success": {"count": "4"}, "queue": queue, "fail": {}}}]

    def close(self) -> None:
        self.closed = True


Make = Callable[..., tuple[Client, list[FakeServer]]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(genserve.retry, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(genserve.retry, "LONGEST_PAUSE_S", 0.02)

    def make(count: int, **options: Any) -> tuple[Client, list[FakeServer]]:
        servers = [FakeServer(f"server-{number}") for number in range(count)]
        return Client(transport=servers, **options), servers

    return make


def ask(client: Client, **options: Any) -> None:
    client.rerank("q", ["d"], **options)


def counts(servers: Sequence[FakeServer]) -> list[int]:
    return [len(server.calls) for server in servers]


def test_idle_servers_take_turns(make: Make) -> None:
    client, servers = make(3)
    for _ in range(9):
        ask(client)
    assert counts(servers) == [3, 3, 3]


def test_least_busy_server_is_called_first(make: Make) -> None:
    client, servers = make(3)
    started, gate = threading.Barrier(3), threading.Event()

    def slow() -> Outputs:
        started.wait(10)
        gate.wait(10)
        return score()

    for server in servers[:2]:
        server.script.append(slow)
    threads = [threading.Thread(target=ask, args=(client,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    started.wait(10)
    for _ in range(6):
        ask(client)
    assert counts(servers) == [1, 1, 6]
    gate.set()
    for thread in threads:
        thread.join(10)
    for _ in range(3):
        ask(client)
    assert counts(servers) == [2, 2, 7]


@pytest.mark.parametrize(
    "error", [ServerUnavailable("down"), QueueFull("full")], ids=lambda error: type(error).__name__
)
def test_full_or_unreachable_server_is_skipped(error: Exception, make: Make) -> None:
    client, servers = make(3)
    servers[0].always = error
    for _ in range(6):
        ask(client)
    assert sum(counts(servers[1:])) == 6
    (first, *_) = servers[0].calls
    assert first in servers[1].calls


@pytest.mark.parametrize(
    "error",
    [InvalidInput("x"), ServerError("x"), Cancelled("x"), OutOfMemory("x"), DeadlineExceeded("x"), NotAllowed("x")],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_are_raised_without_failover(error: Exception, make: Make) -> None:
    client, servers = make(3, retry_for=10)
    servers[0].always = error
    with pytest.raises(type(error)) as caught:
        ask(client)
    assert caught.value is error
    assert counts(servers) == [1, 0, 0]


def test_failed_request_is_no_longer_in_flight(make: Make) -> None:
    client, servers = make(2)
    servers[0].script = [InvalidInput("x")]
    with pytest.raises(InvalidInput):
        ask(client)
    for _ in range(4):
        ask(client)
    assert counts(servers) == [3, 2]


@pytest.mark.parametrize(
    ("errors", "kind"),
    [
        ((ServerUnavailable("a"), ServerUnavailable("b")), ServerUnavailable),
        ((QueueFull("a"), QueueFull("b")), QueueFull),
        ((ServerUnavailable("a"), QueueFull("b")), QueueFull),
    ],
    ids=["unreachable", "full", "mixed"],
)
def test_each_server_is_tried_once(errors: tuple[Exception, Exception], kind: type[Exception], make: Make) -> None:
    client, servers = make(2)
    for server, error in zip(servers, errors, strict=True):
        server.always = error
    with pytest.raises(kind):
        ask(client)
    assert counts(servers) == [1, 1]


def test_retry_for_retries_until_a_server_returns(make: Make) -> None:
    client, servers = make(2, retry_for=10)
    for server in servers:
        server.script = [ServerUnavailable("down")] * 3
    ask(client)
    assert sum(counts(servers)) == 7


def test_retry_for_limits_the_retries(make: Make) -> None:
    client, servers = make(1, retry_for=0.2)
    servers[0].always = ServerUnavailable("down")
    started = time.monotonic()
    with pytest.raises(ServerUnavailable):
        ask(client)
    assert 0.1 < time.monotonic() - started < 2
    assert len(servers[0].calls) > 2


def test_full_queue_is_not_retried(make: Make) -> None:
    client, servers = make(2, retry_for=10)
    for server in servers:
        server.always = QueueFull("full")
    with pytest.raises(QueueFull):
        ask(client)
    assert counts(servers) == [1, 1]


def test_timeout_covers_all_attempts(make: Make) -> None:
    client, servers = make(2, retry_for=60)
    for server in servers:
        server.always = ServerUnavailable("down")
    started = time.monotonic()
    with pytest.raises((ServerUnavailable, DeadlineExceeded)):
        ask(client, timeout=0.2)
    assert time.monotonic() - started < 2
    timeouts = [timeout for server in servers for timeout in server.timeouts]
    assert max(timeouts) <= 0.2
    assert min(timeouts) > 0


def test_failover_gets_the_remaining_time(make: Make) -> None:
    client, servers = make(2)

    def slow_failure() -> Outputs:
        time.sleep(0.2)
        raise ServerUnavailable("went away")

    servers[0].script = [slow_failure]
    ask(client, timeout=10)
    (left,) = servers[1].timeouts
    assert 9 < left <= 9.8

    servers[0].script = servers[1].script = [slow_failure]
    with pytest.raises(DeadlineExceeded):
        ask(client, timeout=0.1)


@pytest.mark.parametrize(("timeout", "expected"), [(None, 5.0), (3.0, 3.0)], ids=["client", "call"])
def test_call_timeout_overrides_client_timeout(timeout: float | None, expected: float, make: Make) -> None:
    client, servers = make(1, timeout=5.0)
    ask(client, timeout=timeout)
    assert expected - 0.5 < servers[0].timeouts[0] <= expected


def test_health_needs_one_ready_server(make: Make) -> None:
    client, servers = make(2)
    assert client.health()
    servers[0].always = ServerUnavailable("down")
    assert client.health()
    servers[1].is_ready = False
    assert not client.health()


def test_status_lists_every_server(make: Make) -> None:
    client, servers = make(3)
    servers[1].always = ServerUnavailable("down")
    servers[2].is_ready = False
    servers[2].script = [ServerUnavailable("no model tasks")]
    task = np.array([b'[{"task_id": "t", "state": "waiting"}]'], dtype=np.object_)
    servers[0].script = [lambda: {"TASK": task}]
    found = client.status()
    assert [(each.url, each.live, each.ready) for each in found] == [
        ("server-0", True, True),
        ("server-1", False, False),
        ("server-2", True, False),
    ]
    assert [each.error for each in found] == ["", "ServerUnavailable: down", ""]
    assert [each.tasks for each in found] == [(TaskStatus("t", "waiting"),), (), ()]
    assert found[0].version == "2.55.0"


def test_models_come_from_the_first_reachable_server(make: Make) -> None:
    client, servers = make(2)
    servers[0].always = ServerUnavailable("down")
    flux, rerank = client.models()
    assert (flux.name, flux.version, flux.state, flux.succeeded, flux.failed, flux.queue_s) == (
        "flux",
        "1",
        "READY",
        4,
        0,
        0.5,
    )
    assert (rerank.name, rerank.state, rerank.succeeded, rerank.queue_s) == ("rerank", "UNAVAILABLE", 0, 0.0)
    servers[1].always = ServerUnavailable("down too")
    with pytest.raises(ServerUnavailable):
        client.models()


def test_context_manager_closes_every_connection(make: Make) -> None:
    client, servers = make(2)
    with client:
        pass
    assert [server.closed for server in servers] == [True, True]


DOWN, FULL, SOON, LATER = (
    ServerUnavailable("down"),
    QueueFull("full"),
    QueueFull("soon", retry_after=1.0),
    QueueFull("later", retry_after=2.0),
)


@pytest.mark.parametrize(
    ("errors", "telling"),
    [
        ((DOWN, FULL), FULL),
        ((FULL, DOWN), FULL),
        ((LATER, FULL, SOON, DOWN), SOON),
        ((SOON, LATER), SOON),
        ((FULL, LATER), LATER),
    ],
    ids=["down-full", "full-down", "all", "both", "one-says-when"],
)
def test_most_helpful_refusal_is_raised(errors: Sequence[GenServeError], telling: GenServeError, make: Make) -> None:
    client, servers = make(len(errors))
    for server, error in zip(servers, errors, strict=True):
        server.always = error
    with pytest.raises(type(telling)) as caught:
        ask(client)
    assert caught.value is telling


def test_retry_after_is_respected(make: Make) -> None:
    client, servers = make(1, retry_for=10)
    servers[0].script = [QueueFull("slow down", retry_after=0.3)]
    started = time.monotonic()
    ask(client)
    assert time.monotonic() - started >= 0.3
    assert counts(servers) == [2]


@pytest.mark.parametrize(
    "options",
    [{"retry_for": 0.0}, {"retry_for": 1.0}, {"retry_for": 60.0, "timeout": 1.0}],
    ids=["none", "less", "late"],
)
def test_retry_after_beyond_the_limit_is_raised_at_once(options: dict[str, float], make: Make) -> None:
    client, servers = make(1, **options)
    servers[0].always = QueueFull("slow down", retry_after=5.0)
    started = time.monotonic()
    with pytest.raises(QueueFull):
        ask(client)
    assert time.monotonic() - started < 3
    assert counts(servers) == [1]


def test_every_attempt_gets_the_remaining_time(make: Make) -> None:
    client, servers = make(1, retry_for=10, timeout=5)
    servers[0].script = [ServerUnavailable("down")] * 4
    ask(client)
    times = servers[0].timeouts
    assert len(times) == 5
    assert times == sorted(times, reverse=True)
    assert len(set(times)) == 5


def test_errors_name_request_server_and_model(make: Make) -> None:
    client, servers = make(2)
    servers[0].always, servers[1].always = DOWN, ServerError("broken")
    with pytest.raises(ServerError) as caught:
        ask(client, task_id="mine")
    error = caught.value
    assert (error.request_id, error.url, error.model) == ("mine", "server-1", "rerank")
    with pytest.raises(InvalidInput) as refused:
        ask(client, priority="urgent")
    assert (refused.value.request_id, refused.value.url, refused.value.model) == ("", "", "")
    servers[1].always = DOWN
    with pytest.raises(ServerUnavailable) as unreachable:
        client.models()
    assert unreachable.value.url == "server-1"


def test_malformed_answer_names_its_server(make: Make) -> None:
    client, servers = make(1)
    servers[0].script = [lambda: {**score(), "INFO": np.array([[b"["]], dtype=np.object_)}]
    with pytest.raises(ServerError, match="INFO is not JSON") as caught:
        ask(client)
    assert caught.value.url == "server-0"


def test_single_transport_needs_no_list() -> None:
    server: Transport = FakeServer("mine")
    client = Client(transport=server)
    assert client.rerank("q", ["d"])[0].score == 0.5
    assert client.health()


@pytest.mark.parametrize(
    "option", [{"url": "localhost:1"}, {"tls": TLS()}, {"headers": {}}], ids=["url", "tls", "headers"]
)
def test_transport_excludes_url_tls_and_headers(option: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="transport is given together with url, tls or headers"):
        Client(transport=FakeServer("mine"), **option)
