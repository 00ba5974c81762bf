"""The FLUX comparison's own parts: the load, the contenders, and the verdict."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import flux_contenders
from compare_flux import Result, broken_promises
from flux_load import STEPS, Load, Request, Timing, drive

PERF = Path(__file__).parents[2] / "perf"


def load(count: int = 12, concurrency: int = 4) -> Load:
    return Load.draw(count, concurrency, 64)


def test_the_load_is_the_same_every_time_and_survives_the_way_to_another_process() -> None:
    assert load(64) == load(64) == Load.from_json(load(64).to_json())
    assert {request.steps for request in load(64).requests} == set(STEPS)
    assert len({request.seed for request in load(64).requests}) == 64


def test_so_many_requests_are_in_flight_and_the_warm_up_is_not_counted() -> None:
    lock = threading.Lock()
    in_flight: list[int] = [0]
    most: list[int] = [0]
    seen: list[int] = []

    def call(request: Request) -> None:
        with lock:
            in_flight[0] += 1
            most[0] = max(most[0], in_flight[0])
            seen.append(request.seed)
        time.sleep(0.01)
        with lock:
            in_flight[0] -= 1

    timing = drive(call, load(12, 4))
    assert most == [4]
    assert len(seen) == len(set(seen)) == 12 + 4
    assert timing.count == 12
    assert timing.seconds >= 12 / 4 * 0.01
    assert Timing.from_json(timing.to_json()) == timing


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The steps of every pipeline call, in order; a call takes a moment."""
    calls: list[list[int]] = []

    class Pipeline:
        def __init__(self, checkpoint: Any) -> None:
            pass

        def __call__(self, requests: Sequence[Request], size: int) -> list[bytes]:
            calls.append([request.steps for request in requests])
            time.sleep(0.02)
            return [str(request.seed).encode() for request in requests]

    monkeypatch.setattr(flux_contenders, "Pipeline", Pipeline)
    return calls


@pytest.mark.parametrize("name", ["lock", "pool"])
def test_the_lock_and_the_pool_make_one_image_a_call(name: str, batches: list[list[int]]) -> None:
    call = flux_contenders.CONTENDERS[name](None, load())  # type: ignore[arg-type]
    assert drive(call, load()).count == 12
    assert [len(batch) for batch in batches] == [1] * 16


def test_static_batches_hold_equal_settings_only(batches: list[list[int]]) -> None:
    call = flux_contenders.static_batches(None, load())  # type: ignore[arg-type]
    assert drive(call, load(40, 16)).count == 40
    assert all(len(set(batch)) == 1 for batch in batches)
    assert max(map(len, batches)) > 1


def result(images_per_second: float, four_steps: float) -> Result:
    return Result([Timing(10 / images_per_second, {4: [four_steps] * 10})])


def test_the_verdict_names_what_is_below_its_promise() -> None:
    ours = result(10, 1.0)
    others = {"engine": result(10, 1), "lock": result(5, 9), "pool": result(5, 9), "static": result(8, 3.1)}
    assert broken_promises({"genserve": ours, **others}) == []
    others["pool"] = result(5.6, 9)
    others["static"] = result(8, 2.9)
    pool, latency = broken_promises({"genserve": ours, **others})
    assert pool.startswith("1.79 times (b)")
    assert "4-step" in latency


@pytest.mark.parametrize("name", ["static", "engine"])
def test_a_contender_runs_by_itself(name: str, tmp_path: Path) -> None:
    from make_flux import make_flux

    make_flux(tmp_path / "flux")
    (tmp_path / "load.json").write_text(Load((Request("a", 1, 1), Request("b", 2, 2)), 2, 64).to_json())
    command = [sys.executable, str(PERF / "flux_contenders.py"), name, str(tmp_path / "flux")]
    ended = subprocess.run(
        [*command, str(tmp_path / "load.json")], capture_output=True, text=True, timeout=100, check=True
    )
    assert Timing.from_json(ended.stdout.strip().rpartition("\n")[2]).count == 2
