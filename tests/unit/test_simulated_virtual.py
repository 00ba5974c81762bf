"""Simulated devices: tables of times, and the virtual clock."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from common.figures import goodput, load_balance
from simulated.device import DEVICES, Device, TableError
from simulated.traffic import HANDOFF_S, Arrival, Mix, at_once, draw_load, poisson
from simulated.virtual import Setup, contenders, simulate

PER_ROW = Device.per_row(0.1)
TABLE = {
    "name": "a table",
    "kind": "cuda",
    "text_tokens": 0,
    "width": 1000,
    "step": {
        "measured": True,
        "source": "a test",
        "floor_s": 0.05,
        "eager": [[1000, 1, 0.1], [1000, 2, 0.12], [1000, 4, 0.2], [4000, 1, 0.4], [4000, 2, 0.8]],
    },
    "encode": {"measured": False, "source": "a test", "points": [[0, 0.01], [1, 0.02]]},
    "decode": {"measured": False, "source": "a test", "points": [[1000, 0.1], [4000, 0.4]]},
    "file": {"measured": False, "source": "a test", "points": [[1000, 0.2]]},
}


@pytest.fixture
def table(tmp_path: Path) -> Device:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(TABLE))
    return Device.load(str(path))


def test_measured_points_are_kept(table: Device) -> None:
    for tokens, rows, seconds in TABLE["step"]["eager"]:  # type: ignore[index]
        assert table.step_s(rows, tokens) == pytest.approx(seconds)


def test_rows_between_and_beyond_the_points_follow_their_lines(table: Device) -> None:
    assert table.step_s(3, 1000) == pytest.approx(0.16)
    assert table.step_s(8, 1000) == pytest.approx(0.36)


def test_sizes_follow_the_work_of_a_row(table: Device) -> None:
    def work(tokens: int) -> float:
        return tokens + tokens**2 / 6000

    share = (work(2000) - work(1000)) / (work(4000) - work(1000))
    assert table.step_s(1, 2000) == pytest.approx(0.1 + share * 0.3)
    assert table.step_s(1, 16000) == pytest.approx(0.4 * work(16000) / work(4000))
    assert table.step_s(4, 500) == pytest.approx(0.2 * work(500) / work(1000))
    assert table.step_s(1, 100) == 0.05  # the floor


def test_other_parts_are_linear_or_proportional(table: Device) -> None:
    assert table.encode_s(3) == pytest.approx(0.04)
    assert table.encode_s(0) == 0.0
    assert [table.decode_s(tokens) for tokens in (500, 2500, 8000)] == pytest.approx([0.05, 0.25, 0.8])
    assert [table.file_s(tokens) for tokens in (500, 2000)] == pytest.approx([0.1, 0.4])
    own_s = 0.02 + 10 * 0.1 + 0.1 + 0.2
    assert table.own_s(rows=1, tokens=1000, steps=10) == pytest.approx(own_s)


def test_factor_multiplies_all_times(table: Device) -> None:
    half = table.times(0.5)
    assert half.own_s(rows=1, tokens=1000, steps=10) == pytest.approx(0.66)
    assert half.step_s(1, 100) == 0.025
    assert Device.load("0.2@0.5").step_s(3, 77) == pytest.approx(0.3)


@pytest.mark.parametrize("path", sorted(DEVICES.glob("*.json")), ids=lambda path: path.stem)
def test_tables_of_the_repository_can_be_loaded(path: Path) -> None:
    device = Device.load(path.stem)
    assert "measured" in device.source or "given" in device.source
    for tokens in (16, 256, 1024, 4096, 16384):
        times = [device.step_s(rows, tokens) for rows in range(1, 17)]
        assert times == sorted(times)
    assert device.step_s(1, 256) < device.step_s(1, 4096)


def test_unknown_tables_are_rejected() -> None:
    with pytest.raises(TableError, match="there is no device 'h300'; known: .*h200"):
        Device.load("h300")
    with pytest.raises(TableError, match="it has no compiled steps"):
        Device.load("h200", compiled=True)


@pytest.mark.parametrize("policy", contenders())
def test_request_alone_takes_its_own_time(policy: str, table: Device) -> None:
    arrival = Arrival(5.0, 512, steps=7, scale=1.0)
    (outcome,) = simulate([arrival], Setup(table, 2, policy)).outcomes
    assert outcome.latency_s == pytest.approx(arrival.own_s(table))
    assert outcome.is_in_time


@pytest.mark.parametrize("policy", contenders())
def test_every_request_is_answered_once_and_no_work_is_lost(policy: str) -> None:
    draw = random.Random(1)
    load = draw_load(Mix.load("steps"), poisson(4.0, draw), draw, seconds=300)
    ran = simulate(load, Setup(PER_ROW, 8, policy))
    assert [outcome.error for outcome in ran.outcomes] == [""] * len(load)
    assert [outcome.arrived for outcome in ran.outcomes] == [arrival.at for arrival in load]
    assert sum(ran.busy_s) == pytest.approx(sum(arrival.device_s(PER_ROW) for arrival in load))
    assert all(outcome.slowdown > 0.999 for outcome in ran.outcomes)


@pytest.mark.parametrize("policy", ["urgency", "static"])
def test_images_of_a_size_share_a_forward(policy: str, table: Device) -> None:
    load = [Arrival(0.0, 512, steps=10)] * 4
    ran = simulate(load, Setup(table, 1, policy, max_running=5))
    assert sum(ran.busy_s) < 0.7 * sum(arrival.device_s(table) for arrival in load)


def test_image_with_few_steps_leaves_first_only_between_steps() -> None:
    load = [Arrival(0.0, 512, steps=20), Arrival(0.01, 512, steps=2)]
    seconds = {
        policy: simulate(load, Setup(PER_ROW, 1, policy)).outcomes[1].latency_s for policy in ("urgency", "lock")
    }
    assert seconds["urgency"] < 1.0
    assert seconds["lock"] > 2.0


def test_urgent_image_goes_first() -> None:
    load = [Arrival(0.0, 512, steps=10, level=3)] * 40 + [Arrival(1.0, 512, steps=10, level=1)]
    latencies = [outcome.latency_s for outcome in simulate(load, Setup(PER_ROW, 1, max_running=2)).outcomes]
    assert latencies[-1] < 5.0
    assert max(latencies) > 30.0


def test_late_requests_fail_and_full_queues_reject() -> None:
    load = [Arrival(0.0, 512, steps=10, scale=1.5)] * 30
    ran = simulate(load, Setup(PER_ROW, 1, "fifo", max_running=1, max_waiting=0, queue_size=20))
    kinds = [outcome.error for outcome in ran.outcomes]
    assert (kinds.count(""), kinds.count("QueueFull"), kinds.count("DeadlineExceeded")) == (1, 9, 20)
    assert goodput(ran.outcomes) == 1 / 30


def test_idle_instances_get_the_work() -> None:
    load = draw_load(Mix.load("steps"), at_once(400), random.Random(0))
    ran = simulate(load, Setup(PER_ROW, 4, usual_tokens=64), in_flight=100)
    assert load_balance(ran.busy_s) > 0.94
    assert sum(ran.busy_s) / (4 * ran.seconds) > 0.95
    assert ran.taken_s < ran.seconds


def test_requests_in_flight_are_kept() -> None:
    load = [Arrival(0.0, 512, steps=10)] * 9
    outcomes = simulate(load, Setup(PER_ROW, 1, "lock"), in_flight=1).outcomes
    assert [outcome.arrived for outcome in outcomes] == pytest.approx([number * (1 + HANDOFF_S) for number in range(9)])
