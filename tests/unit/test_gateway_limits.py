"""Limits of the gateway: requests per time, requests at once, and the size of a request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from fake_servers import FakeServer, scores
from gateway_app import RERANK, gateway, with_gateway

from genserve.gateway.keys import digest_of
from genserve.gateway.limiter import Limiter, Limits, network_of
from genserve.protocol import Call, Outputs

KEYS = f"""
alice {digest_of("a")}
bob {digest_of("b")} rate=4/minute concurrency=3
"""


def as_caller(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def statuses(http: httpx.AsyncClient, count: int, key: str) -> list[int]:
    return [(await http.post("/v2/rerank", json=RERANK, headers=as_caller(key))).status_code for _ in range(count)]


def test_rate_is_counted_per_key_with_its_own_limit() -> None:
    async def ask(http: httpx.AsyncClient) -> None:
        assert await statuses(http, 3, "a") == [200, 200, 429]
        assert await statuses(http, 5, "b") == [200] * 4 + [429]
        assert await statuses(http, 1, "a") == [429]

    with_gateway(ask, keys=KEYS, limits=Limits.parse(rate="2/minute"))


@pytest.mark.parametrize(
    "path", ["/v2/rerank", "/rerank", "/score", "/v1/ranking", "/v1/images/generations", "/status"]
)
def test_refusal_says_when_to_come_back(path: str) -> None:
    async def ask(http: httpx.AsyncClient) -> httpx.Response:
        await http.get("/status")
        return await http.get(path)

    answer = with_gateway(ask, limits=Limits.parse(rate="1/minute"))
    assert answer.status_code == 429
    assert 50 <= int(answer.headers["retry-after"]) <= 60
    assert "too many requests: the limit is 1 per 1 minute" in answer.text
    assert answer.headers["x-request-id"] in answer.text


def test_addresses_count_without_keys() -> None:
    async def ask() -> None:
        limits = Limits.parse(rate="1/minute")
        limiter = Limiter(1)
        for caller, refused in (("192.0.2.1", False), ("192.0.2.2", False), ("192.0.2.1", True)):
            if refused:
                with pytest.raises(Exception, match="1 per 1 minute"):
                    async with limiter.admitted(caller, limits):
                        pass
            else:
                async with limiter.admitted(caller, limits):
                    pass

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("address", "caller"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_owner_of_an_ipv6_network_is_one_caller(address: str, caller: str) -> None:
    assert network_of(address) == caller


def test_forged_address_counts_as_the_true_one() -> None:
    async def ask(http: httpx.AsyncClient) -> list[int]:
        return [
            (await http.get("/status", headers={"X-Forwarded-For": f"192.0.2.{number}"})).status_code
            for number in range(2)
        ]

    assert with_gateway(ask, limits=Limits.parse(rate="1/minute")) == [200, 429]


class Gate:
    """Answers that wait until the test opens the gate."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.waiting = 0

    async def __call__(self, call: Call) -> Outputs:
        self.waiting += 1
        await self.open.wait()
        return scores(call)

    async def until_waiting(self, count: int) -> None:
        while self.waiting < count:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(("key", "most"), [("a", 2), ("b", 3)])
def test_requests_at_once_are_limited_per_key(key: str, most: int) -> None:
    async def ask() -> None:
        server = FakeServer()
        server.always = gate = Gate()
        async with gateway(server, keys=KEYS, limits=Limits.parse(concurrency=2), retry_after_s=7) as http:
            running = [asyncio.ensure_future(statuses(http, 1, key)) for _ in range(most)]
            await gate.until_waiting(most)
            refused = await http.post("/v2/rerank", json=RERANK, headers=as_caller(key))
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "7")
            assert f"{most} requests run already" in refused.text
            for path in ("/health", "/metrics"):
                assert (await http.get(path, headers=as_caller(key))).status_code == 200
            gate.open.set()
            assert await asyncio.gather(*running) == [[200]] * most
            assert await statuses(http, 1, key) == [200], "the place is free again"

    asyncio.run(ask())


def test_caller_that_goes_away_frees_its_place() -> None:
    async def ask() -> None:
        server = FakeServer()
        server.always = gate = Gate()
        async with gateway(server, limits=Limits.parse(concurrency=1)) as http:
            leaving = asyncio.ensure_future(http.post("/v2/rerank", json=RERANK))
            await gate.until_waiting(1)
            leaving.cancel()
            await asyncio.wait({leaving})
            gate.open.set()
            assert (await http.post("/v2/rerank", json=RERANK)).status_code == 200

    asyncio.run(ask())


def test_request_over_the_limit_at_once_does_not_count_for_the_rate() -> None:
    async def ask() -> None:
        limiter = Limiter(1)
        limits = Limits.parse(rate="2/minute", concurrency=1)
        async with limiter.admitted("a", limits):
            with pytest.raises(Exception, match="run already"):
                async with limiter.admitted("a", limits):
                    pass
        async with limiter.admitted("a", limits):
            pass
        with pytest.raises(Exception, match="2 per 1 minute"):
            async with limiter.admitted("a", limits):
                pass
        assert not limiter._running, "callers that are gone are forgotten"

    asyncio.run(ask())


@pytest.mark.parametrize("rate", ["", "fast", "0/minute", "60", "-1/minute", "1/fortnight"])
def test_invalid_rate_is_rejected(rate: str) -> None:
    with pytest.raises(ValueError, match="allowed: as 60/minute"):
        Limits.parse(rate=rate)


# The size of a request.


async def chunks(size: int) -> AsyncIterator[bytes]:
    for _ in range(size // 512):
        yield b" " * 512


@pytest.mark.parametrize(
    "path", ["/v2/rerank", "/rerank", "/score", "/v1/ranking", "/v1/images/generations", "/generate"]
)
@pytest.mark.parametrize(
    ("size", "announced", "refused"),
    [(4096, "4096", False), (4097, "4097", True), (0, "9" * 30, True), (0, "9" * 5000, True)],
    ids=["allowed", "large", "huge", "absurd"],
)
def test_announced_size_is_limited(path: str, size: int, announced: str, refused: bool) -> None:
    headers = {"content-type": "application/json", "content-length": announced}
    answer = with_gateway(lambda http: http.post(path, content=b" " * size, headers=headers), max_body_bytes=4096)
    assert answer.status_code in ({413} if refused else {400, 422})
    assert ("allowed: 4,096 bytes" in answer.text) == refused


@pytest.mark.parametrize(("size", "refused"), [(4096, False), (4608, True), (10**7, True)])
def test_streamed_size_is_limited(size: int, refused: bool) -> None:
    answer = with_gateway(
        lambda http: http.post("/v2/rerank", content=chunks(size), headers={"content-type": "application/json"}),
        max_body_bytes=4096,
    )
    assert (answer.status_code == 413) == refused
    assert ("allowed: 4,096 bytes" in answer.text) == refused


def test_bodies_together_are_limited() -> None:
    async def ask() -> None:
        server = FakeServer()
        server.always = gate = Gate()
        large = {**RERANK, "padding": "x" * 6000}
        async with gateway(server, max_body_bytes=8000, max_bodies_bytes=10_000, retry_after_s=7) as http:
            running = asyncio.ensure_future(http.post("/v2/rerank", json=large))
            await gate.until_waiting(1)
            refused = await http.post("/v2/rerank", json=large)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "7")
            small = asyncio.ensure_future(http.post("/v2/rerank", json=RERANK))
            await gate.until_waiting(2)
            gate.open.set()
            assert [(await each).status_code for each in (running, small)] == [200, 200]
            assert (await http.post("/v2/rerank", json=large)).status_code == 200, "the memory is free again"

    asyncio.run(ask())


def test_body_of_a_request_without_one_is_limited_too() -> None:
    server = FakeServer()

    async def never(model: str = "") -> bool:
        await asyncio.Event().wait()
        return True

    server.ready = never  # type: ignore[method-assign]
    answer = with_gateway(
        lambda http: http.request("GET", "/health", content=chunks(10**6)), server, max_body_bytes=4096
    )
    assert answer.status_code == 413
