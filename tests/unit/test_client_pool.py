"""Several servers: choice by load and speed, servers set aside and taken back, servers that hang."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from fake_servers import FakeServer, after

from genserve import AsyncClient, Cancelled, DeadlineExceeded, ServerUnavailable, pool
from genserve.access import Address
from genserve.discovery import is_name, resolved
from genserve.protocol import Call, Outputs

DOWN = ServerUnavailable("down")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "PROBE_FIRST_S", 0.01)
    monkeypatch.setattr(pool, "PROBE_LONGEST_S", 0.04)
    monkeypatch.setattr(pool, "WATCH_S", 0.03)


def fleet(count: int, **options: Any) -> list[FakeServer]:
    return [FakeServer(f"server-{number}", **options) for number in range(count)]


def client(servers: Sequence[FakeServer], **options: Any) -> AsyncClient:
    return AsyncClient(transport=servers, **options)


async def until(condition: Callable[[], Any]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    pytest.fail("the condition did not come true")


def counts(servers: Sequence[FakeServer]) -> list[int]:
    return [len(server.calls) for server in servers]


def test_failed_server_is_set_aside_until_it_is_ready() -> None:
    async def run() -> None:
        servers = fleet(2)
        servers[0].script = [DOWN]
        servers[0].is_ready = DOWN
        async with client(servers) as ours:
            for _ in range(10):
                await ours.rerank("q", ["d"])
            assert counts(servers) == [1, 10]
            await until(lambda: servers[0].probes.count("rerank") >= 2)
            servers[0].is_ready, before = True, len(servers[0].probes)
            await until(lambda: len(servers[0].probes) > before)
            for _ in range(10):
                await ours.rerank("q", ["d"])
            assert counts(servers) == [6, 15]

    asyncio.run(run())


def test_probes_end_when_a_server_is_taken_back_and_when_the_client_closes() -> None:
    async def run() -> None:
        servers = fleet(3)
        for server in servers[:2]:
            server.script = [DOWN]
        servers[0].is_ready = DOWN
        async with client(servers) as ours:
            for _ in range(3):
                await ours.rerank("q", ["d"])
            await until(lambda: servers[1].probes)
        await asyncio.sleep(0.1)
        probes = [len(server.probes) for server in servers]
        await asyncio.sleep(0.1)
        assert [len(server.probes) for server in servers] == probes
        assert probes[1:] == [1, 0]

    asyncio.run(run())


def test_server_is_set_aside_for_one_model_only() -> None:
    async def run() -> None:
        servers = fleet(2)
        servers[0].script = [DOWN]
        servers[0].is_ready = False
        async with client(servers) as ours:
            await ours.generate("x")
            for _ in range(4):
                await ours.generate("x")
                await ours.rerank("q", ["d"])
        models = [[call.model for call in server.calls] for server in servers]
        assert models[0].count("flux") == 1
        assert models[0].count("rerank") == 2

    asyncio.run(run())


def test_probes_slow_down_for_a_server_that_says_ready_and_fails() -> None:
    async def run() -> None:
        servers = fleet(2)
        servers[0].always = DOWN
        async with client(servers) as ours:
            for _ in range(60):
                await ours.rerank("q", ["d"])
                await asyncio.sleep(0.002)
        # Without the growing pause, the server would be tried about every tenth of its second.
        assert 2 <= counts(servers)[0] <= 12

    asyncio.run(run())


def test_servers_that_are_aside_are_tried_when_no_other_is_left() -> None:
    async def run() -> None:
        servers = fleet(2)
        for server in servers:
            server.script = [DOWN]
            server.is_ready = DOWN
        async with client(servers) as ours:
            with pytest.raises(ServerUnavailable):
                await ours.rerank("q", ["d"])
            assert (await ours.rerank("q", ["d"])).scores == (1.0,)

    asyncio.run(run())


def test_slow_server_gets_fewer_requests_but_is_never_idle() -> None:
    async def run() -> list[int]:
        servers = fleet(4)
        for server in servers[:3]:
            server.always = after(0.1)
        servers[3].always = after(0.4)
        async with client(servers) as ours:
            async for result in ours.map_rerank([("q", ["d"])] * 120, concurrency=12, ordered=False):
                assert result.ok
        return counts(servers)

    shares = asyncio.run(run())
    assert sum(shares) == 120
    # Such servers answer any number at once. By number alone, the slow one would get as many at a time as the others,
    # 9 in all; by speed as well, about half of that.
    assert 2 <= shares[3] <= 8
    assert max(shares[:3]) - min(shares[:3]) <= 8


def test_hung_server_loses_its_requests_to_the_others() -> None:
    async def run() -> None:
        servers = fleet(2)
        servers[0].hung = True
        servers[0].is_live = servers[0].is_ready = DOWN
        async with client(servers) as ours:
            images = await asyncio.gather(*(ours.generate(f"picture {number}", seed=number) for number in range(8)))
        assert [image.data.decode() for image in images] == [f"picture {number}" for number in range(8)]
        assert counts(servers) == [4, 8]
        assert servers[0].probes.count("live") == 3
        assert servers[0].running == 0

    asyncio.run(run())


def test_busy_server_that_answers_probes_keeps_its_requests() -> None:
    async def run() -> None:
        servers = fleet(1)
        servers[0].always = after(0.4)
        async with client(servers) as ours:
            await asyncio.gather(*(ours.generate("x") for _ in range(3)))
        assert counts(servers) == [3]
        assert servers[0].probes.count("live") >= 3

    asyncio.run(run())


def test_request_is_sent_again_with_the_same_seed_and_the_rest_of_its_time() -> None:
    async def run() -> None:
        servers = fleet(3)

        async def dies(call: Call) -> Outputs:
            await asyncio.sleep(0.05)
            raise ServerUnavailable("died")

        servers[0].script, servers[1].script = [dies], [dies]
        seen: list[float] = []
        infer = servers[2].infer

        async def timed(call: Call, timeout_s: float) -> Outputs:
            seen.append(timeout_s)
            return await infer(call, timeout_s)

        servers[2].infer = timed  # type: ignore[method-assign]
        async with client(servers, timeout=10) as ours:
            image = await ours.generate("x")
        seeds = {int(call.inputs["SEED"].item()) for server in servers for call in server.calls}
        assert seeds == {image.seed}
        assert 9 < seen[0] < 9.91

    asyncio.run(run())


def test_drawn_seeds_differ() -> None:
    async def run() -> None:
        (server,) = servers = fleet(1)
        async with client(servers) as ours:
            images = [await ours.generate("x") for _ in range(20)]
        assert len({image.seed for image in images}) == 20
        assert all(0 <= image.seed < 2**63 for image in images)
        assert server.calls[0].inputs["SEED"].item() == images[0].seed

    asyncio.run(run())


@pytest.mark.parametrize("how", ["cancelled", "deadline"])
def test_request_given_up_is_cancelled_on_its_server(how: str) -> None:
    async def run() -> None:
        (server,) = servers = fleet(1)
        if how == "deadline":
            server.script = [DeadlineExceeded("too late")]
        else:
            server.hung = True
        async with client(servers) as ours:
            request = asyncio.ensure_future(ours.generate("x", task_id="mine"))
            await asyncio.sleep(0.02)
            request.cancel()
            with pytest.raises((asyncio.CancelledError, DeadlineExceeded)):
                await request
        assert server.tasks == [("cancel", "mine")]

    asyncio.run(run())


def test_close_cancels_submitted_tasks() -> None:
    async def run() -> None:
        (server,) = servers = fleet(1)
        server.hung = True
        async with client(servers) as ours:
            task = ours.submit("x")
            await until(lambda: server.running)
        assert task.done()
        with pytest.raises(Cancelled):
            await task.result()
        assert server.tasks[-1] == ("cancel", task.id)
        assert server.closed == 1

    asyncio.run(run())


def test_close_gives_up_requests_in_flight() -> None:
    async def run() -> None:
        (server,) = servers = fleet(1)
        server.hung = True
        ours = client(servers)
        request = asyncio.ensure_future(ours.generate("x", task_id="mine"))
        await until(lambda: server.running)
        await ours.close()
        with pytest.raises(Cancelled, match="the client was closed"):
            await request
        assert server.running == 0
        assert server.tasks == [("cancel", "mine")]

    asyncio.run(run())


def test_hung_requests_fail_with_errors_of_their_own() -> None:
    async def run() -> None:
        (server,) = servers = fleet(1)
        server.hung = True
        server.is_live = DOWN
        async with client(servers) as ours:
            found = await asyncio.gather(
                *(ours.generate("x", task_id=name) for name in ("one", "two")), return_exceptions=True
            )
        assert [(type(error), error.request_id) for error in found if isinstance(error, ServerUnavailable)] == [
            (ServerUnavailable, "one"),
            (ServerUnavailable, "two"),
        ]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("localhost:8001", False),
        ("gpu.localhost:8001", False),
        ("10.0.0.1:8001", False),
        ("http://[::1]:8000", False),
        ("genserve:8001", True),
        ("https://models.example.org/team", True),
    ],
)
def test_only_names_of_other_machines_are_looked_up(url: str, named: bool) -> None:
    assert is_name(Address.parse(url)) is named


class Names:
    """Replacement for the system's lookup of names, which tests cannot change."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *found: tuple[socket.AddressFamily, str]) -> None:
        self.found = list(found)
        self.asked = 0
        monkeypatch.setattr(socket, "getaddrinfo", self.look_up)

    def look_up(self, host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        self.asked += 1
        if not self.found:
            raise socket.gaierror(-2, "Name or service not known")
        return [(family, socket.SOCK_STREAM, 6, "", (address, port)) for family, address in self.found]


V4, V6 = socket.AF_INET, socket.AF_INET6


@pytest.mark.parametrize(
    ("found", "authorities"),
    [
        ([(V4, "10.0.0.2"), (V4, "10.0.0.1")], ["10.0.0.1:80", "10.0.0.2:80"]),
        ([(V4, "10.0.0.1")], []),
        ([(V4, "10.0.0.1"), (V6, "fd00::1")], []),
        ([(V6, "fd00::1"), (V6, "fd00::2"), (V4, "10.0.0.1")], ["[fd00::1]:80", "[fd00::2]:80"]),
        ([], []),
    ],
    ids=["two", "one", "both-kinds", "ipv6", "unknown"],
)
def test_addresses_of_a_name(found: Any, authorities: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Names(monkeypatch, *found)
    addresses = asyncio.run(resolved(Address.parse("http://genserve/team")))
    assert [each.authority for each in addresses] == authorities
    assert {(each.named, each.prefix) for each in addresses} <= {("genserve:80", "/team")}


def test_name_with_several_addresses_counts_as_several_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    from genserve import aio, discovery

    made: dict[str, FakeServer] = {}

    def connect(address: Address, url: str, **_: Any) -> FakeServer:
        return made.setdefault(url, FakeServer(url))

    monkeypatch.setattr(aio, "connect_to", connect)
    names = Names(monkeypatch, (V4, "10.0.0.1"), (V4, "10.0.0.2"))
    monkeypatch.setattr(discovery, "REFRESH_S", 0.05)

    async def run() -> None:
        async with AsyncClient("genserve:8001") as ours:
            for _ in range(4):
                await ours.rerank("q", ["d"])
            assert {url: len(server.calls) for url, server in made.items()} == {
                "genserve:8001": 0,
                "10.0.0.1:8001": 2,
                "10.0.0.2:8001": 2,
            }
            names.found = [(V4, "10.0.0.2"), (V4, "10.0.0.3")]
            while "10.0.0.3:8001" not in made or not made["10.0.0.3:8001"].calls:
                await ours.rerank("q", ["d"])
                await asyncio.sleep(0.01)
        assert made["10.0.0.1:8001"].closed == 1
        assert all(server.closed for server in made.values())
        assert names.asked >= 2

    asyncio.run(run())
