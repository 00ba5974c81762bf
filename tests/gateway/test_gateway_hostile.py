"""Hostile requests to a gateway in front of a real server, and 300 requests at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
from conftest import Server
from gateways import Gateway, running_gateway

from genserve import Client
from hostile.attack import Attack, Verdict, request, send_all
from hostile.generated import generated
from hostile.mangled import mangled
from hostile.raw import raw
from studies.gateway_hostile import at_once

CONNECTIONS = 8
SEED = 7
GROWTH_MIB = 100
"""A growth with every request would be greater after a hundred bodies of a megabyte."""


@dataclass(frozen=True)
class Target:
    """Gateway under attack."""

    gateway: Gateway

    def attack(self, *attacks: Attack) -> Verdict:
        return send_all(attacks, self.address, connections=CONNECTIONS)

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.gateway.port

    @property
    def memory_mib(self) -> float:
        lines = httpx.get(f"{self.gateway.url}/metrics").text.splitlines()
        return (
            float(next(line for line in lines if line.startswith("process_resident_memory_bytes")).split()[1]) / 2**20
        )


@pytest.fixture(scope="module")
def target(running_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    running_server.wait_ready()
    with running_gateway(tmp_path_factory.mktemp("gateway"), running_server.grpc) as gateway:
        yield Target(gateway)


@pytest.fixture(autouse=True)
def unharmed(running_server: Server, target: Target) -> Iterator[None]:
    """Check after a test that gateway and server answer, that no process has ended, and no defect is in the log."""
    running_server.wait_ready()
    before = {process.pid for process in running_server.family()}
    yield
    with Client(running_server.grpc) as client:
        assert client.generate("still well", steps=1, height=64, width=64).data
    answer = httpx.post(f"{target.gateway.url}/v2/rerank", json={"query": "q", "documents": ["a"]}, timeout=60)
    assert answer.status_code == 200
    assert {process.pid for process in running_server.family()} == before
    assert [line for line in target.gateway.log.read_text().splitlines() if "Traceback" in line] == []


def test_generated_requests(target: Target) -> None:
    document = httpx.get(f"{target.gateway.url}/openapi.json").json()
    verdict = target.attack(*generated(document, 800, seed=SEED))
    assert verdict.broken == []
    assert verdict.statuses.total() > 700
    assert verdict.statuses[200] > 50
    assert verdict.statuses[400] + verdict.statuses[422] > 300


def test_mangled_json(target: Target) -> None:
    verdict = target.attack(*mangled(450, seed=SEED))
    assert verdict.broken == []
    assert verdict.statuses[400] + verdict.statuses[422] > 250


def test_raw_bytes(target: Target) -> None:
    verdict = target.attack(*raw(250, seed=SEED))
    assert verdict.broken == []
    assert {404, 405, 413} <= verdict.statuses.keys()


def test_memory_does_not_grow(target: Target) -> None:
    bodies = (
        b"[" * 1_000_000,
        b'{"prompt": "' + b"x" * 8_000_000 + b'"}',
        b'{"texts": [' + b"1, " * 2_000_000 + b"1]}",
    )
    headers = [(b"Content-Type", b"application/json")]
    large = [Attack("large", (request(b"POST", b"/rerank", body, headers=headers),)) for body in bodies]
    assert target.attack(*large * 4).broken == []
    before = target.memory_mib
    verdict = target.attack(*large * 12)
    assert verdict.broken == []
    assert verdict.statuses.keys() <= {400, 422}
    assert target.memory_mib - before < GROWTH_MIB


def test_300_requests_at_once(target: Target) -> None:
    verdict = at_once(target.address, 300)
    assert verdict.broken == []
    assert verdict.statuses.keys() <= {200, 429, 503}
    assert verdict.statuses[200] >= 150
    assert verdict.statuses.total() == 300
