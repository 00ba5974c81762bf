"""The servers of `genserve tune`: which are alive when, and the estimates of their time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from genserve.serve.options import ServeError
from genserve.tune import bench as bench_module
from genserve.tune.bench import WARM_UP, Bench
from genserve.tune.interrupts import Interrupts
from genserve.tune.load import Sample, TrialFailed, rerank_load
from genserve.types import InstanceLoad

GIB = 2**30
LOAD = rerank_load(in_flight=2, documents=3, length=4)


@dataclass
class Machine:
    """Simulated servers.

    Attributes:
        started: Environment of each server, in order.
        alive: Environments of those that run.
        blocks: Queries of each block, in order.
        free: Free memory for the servers that follow.
        failure: Error of the next block.
    """

    started: list[Mapping[str, str]] = field(default_factory=list)
    alive: list[Mapping[str, str]] = field(default_factory=list)
    blocks: list[list[str]] = field(default_factory=list)
    free: int = 10 * GIB
    failure: Exception | None = None


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    state = Machine()

    @contextmanager
    def own_server(models: tuple[str, ...], *, environment: Mapping[str, str], **_: Any) -> Iterator[Mapping[str, str]]:
        assert models == ("rerank",)
        if environment["MAX_NUM_SEQS"] == "-1":
            raise ServeError("the server did not start: MAX_NUM_SEQS is -1; its log is nowhere")
        state.started.append(environment)
        state.alive.append(environment)
        try:
            yield {"grpc": "127.0.0.1:1"}
        finally:
            state.alive.remove(environment)

    async def drive(_: Any, __: Any, requests: list[Any], *, limit_s: float) -> Sample:
        assert limit_s > 0
        state.blocks.append([request["query"] for request in requests])
        if state.failure:
            raise state.failure
        return Sample(2.0, 10, (0.1,))

    def look(*_: Any) -> tuple[InstanceLoad, ...]:
        return (InstanceLoad("rerank_0_0", "rerank", "cpu", None, 0, 0, GIB, state.free, 16 * GIB, ready=True),)

    monkeypatch.setattr(bench_module, "own_server", own_server)
    monkeypatch.setattr(bench_module, "drive", drive)
    monkeypatch.setattr(Bench, "_look", look)
    return state


@pytest.fixture
def bench(machine: Machine, tmp_path: Path) -> Iterator[Bench]:
    with Interrupts() as interrupts:
        yield Bench(
            LOAD,
            environment={"MAX_NUM_SEQS": "9", "RERANK_MODEL_PATH": "/m"},
            variables=("MAX_NUM_SEQS", "WORKERS"),
            options=(),
            log=tmp_path / "log",
            interrupts=interrupts,
        )


def block(bench: Bench, number: int = 1, **values: str) -> Sample:
    return bench.block(values, number, start_s=100.0, block_s=100.0)


def test_two_servers_stay_alive_side_by_side(machine: Machine, bench: Bench) -> None:
    for _ in range(2):
        block(bench)
        block(bench, WORKERS="2")
    assert len(machine.started) == len(machine.alive) == 2
    bench.drop({"WORKERS": "2"})
    assert [each["WORKERS"] for each in machine.alive] == [""]
    bench.close()
    assert machine.alive == []


def test_servers_take_turns_without_the_memory_for_two(machine: Machine, bench: Bench) -> None:
    machine.free = GIB
    for _ in range(2):
        block(bench)
        block(bench, WORKERS="2")
        assert len(machine.alive) == 1
    assert len(machine.started) == 4


def test_instances_need_their_memory(machine: Machine, bench: Bench) -> None:
    machine.free = 3 * GIB
    block(bench)
    block(bench, WORKERS="2")
    assert len(machine.alive) == 2
    bench.drop({"WORKERS": "2"})
    block(bench, WORKERS="3")
    assert [each["WORKERS"] for each in machine.alive] == ["3"]


def test_tuned_variables_are_those_of_the_trial_and_no_cache_answers(machine: Machine, bench: Bench) -> None:
    block(bench, WORKERS="2")
    (environment,) = machine.started
    assert environment == {
        "MAX_NUM_SEQS": "",
        "RERANK_MODEL_PATH": "/m",
        "WORKERS": "2",
        "SCORE_CACHE_BYTES": "0",
    }


def test_each_server_is_warmed_up_with_requests_of_no_block(machine: Machine, bench: Bench) -> None:
    block(bench, number=3)
    block(bench, number=3, WORKERS="2")
    warm_up, first, same_warm_up, second = machine.blocks
    assert warm_up == same_warm_up == [LOAD.request(WARM_UP + index)["query"] for index in range(2)]
    assert first == second == [each["query"] for each in LOAD.block(3, 2)]


def test_block_lasts_as_long_as_it_should(machine: Machine, bench: Bench) -> None:
    bench.calibrate({}, block_s=10.0, deadline=time.monotonic() + 1000)
    assert bench.count == 5 * 2
    assert bench.seconds(6, starts=0) == pytest.approx(6 * 10.0)


def test_estimate_counts_restarts_if_servers_take_turns(machine: Machine, bench: Bench) -> None:
    machine.free = GIB
    bench.calibrate({}, block_s=10.0, deadline=time.monotonic() + 1000)
    bench._starts = [7.0]
    bench._stop_s = 1.0
    assert bench.seconds(6, starts=1) == pytest.approx(6 * (10.0 + 7.0 + 1.0))


def test_failed_server_is_stopped(machine: Machine, bench: Bench) -> None:
    block(bench)
    machine.failure = TrialFailed("the worker died")
    with pytest.raises(TrialFailed, match="the worker died"):
        block(bench)
    assert machine.alive == []
    machine.failure = None
    block(bench)
    assert len(machine.started) == 2


def test_server_that_does_not_start_is_a_failed_trial(machine: Machine, bench: Bench) -> None:
    with pytest.raises(TrialFailed) as caught:
        block(bench, MAX_NUM_SEQS="-1")
    assert str(caught.value) == "the server did not start: MAX_NUM_SEQS is -1"
    with pytest.raises(TrialFailed, match="WORKERS is 'two'"):
        block(bench, WORKERS="two")
    assert machine.alive == []
