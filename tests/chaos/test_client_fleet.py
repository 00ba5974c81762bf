"""Short versions of studies in perf/: bulk calls to four servers while some of them fail, and a killed map verb."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from genserve import Client, grpc_transport, http_transport, pool
from simulated.fleet import PROTOCOLS, SimulatedServer, fleet
from simulated.load import draw_requests, map_all
from studies import client_faults, map_kills

STEP_S = 0.02
PAUSE_S = 4.0


@pytest.fixture(scope="module")
def servers() -> Iterator[list[SimulatedServer]]:
    with fleet([STEP_S] * client_faults.SERVERS) as servers:
        yield servers


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_server_takes_part_and_every_answer_is_right(servers: list[SimulatedServer], protocol: str) -> None:
    with Client([server.url(protocol) for server in servers]) as client:
        answers = map_all(client, draw_requests(120, steps=(1, 4)))
    assert answers.faults() == []
    assert answers.by_server.keys() == {server.name for server in servers}


@pytest.mark.parametrize(
    ("protocol", "faults"),
    [
        pytest.param("grpc", [client_faults.kill, client_faults.stop, client_faults.restart], id="killed-and-others"),
        pytest.param("grpc", [client_faults.pause, client_faults.pause], id="stopped-for-a-while-grpc"),
        pytest.param("http", [client_faults.pause, client_faults.kill], id="stopped-for-a-while-http"),
    ],
)
def test_faults_of_servers_fail_no_request(
    servers: list[SimulatedServer],
    protocol: str,
    faults: Sequence[client_faults.Fault],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_faults, "PAUSE_S", PAUSE_S)
    # The client notices a server that hangs before the pause is over, so its answers come too late.
    monkeypatch.setattr(pool, "WATCH_S", 0.5)
    monkeypatch.setattr(pool, "HUNG_PROBES", 1)
    for transport in (grpc_transport, http_transport):
        monkeypatch.setattr(transport, "PROBE_TIMEOUT_S", 1.0)
    answers = client_faults.run(servers, draw_requests(120, steps=(8, 12)), faults, protocol=protocol)
    assert answers.faults() == []
    assert answers.by_server.total() == 120


def test_killed_map_verb_continues_where_it_was(servers: list[SimulatedServer], tmp_path: Path) -> None:
    requests = draw_requests(100, steps=(6, 10))
    outcome = map_kills.run(tmp_path, [server.url("grpc") for server in servers], requests, kills=3, seed=1)
    assert (outcome.right, outcome.faults) == (100, [])
    assert len(outcome.kills) == 3
    assert outcome.kills[0] < 100
