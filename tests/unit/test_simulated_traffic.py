"""Loads of simulated devices: arrivals, mixes and public traces."""

from __future__ import annotations

import json
import random
import statistics
from itertools import islice, pairwise
from pathlib import Path

import pytest

from simulated.device import Device
from simulated.traffic import (
    HANDOFF_S,
    Arrival,
    Mix,
    TraceError,
    at_once,
    bursts,
    draw_load,
    mixes,
    poisson,
    read_trace,
    replay,
    window,
)

HEAD = (
    "gmt_create,predict_type,predict_status,exec_time_seconds,groupId,prompt_length,negative_prompt_length,"
    "num_images_per_prompt,num_inference_steps,checkpoint_model_version_id,num_lora\n"
)


def gaps(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def test_poisson_has_its_rate_and_independent_gaps() -> None:
    found = gaps(list(islice(poisson(5.0, random.Random(0)), 20_000)))
    assert statistics.fmean(found) == pytest.approx(0.2, rel=0.03)
    assert statistics.stdev(found) == pytest.approx(statistics.fmean(found), rel=0.03)


def test_bursts_have_the_mean_rate_and_wider_gaps() -> None:
    times = list(islice(bursts(5.0, random.Random(0)), 50_000))
    found = gaps(times)
    assert times[-1] / len(times) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(found) > 1.15 * statistics.fmean(found)


def test_hours_shape_the_day() -> None:
    hours = [1.0] * 12 + [3.0] * 12
    times = list(islice(poisson(1.0, random.Random(0), hours=hours), 86_400))
    assert times[-1] == pytest.approx(86_400, rel=0.02)
    morning = sum(at < 12 * 3600 for at in times)
    assert morning / len(times) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("name", mixes())
def test_mix_names_its_source_and_draws_what_it_says(name: str) -> None:
    mix = Mix.load(name)
    assert len(mix.source) > 40
    load = draw_load(mix, at_once(2000), random.Random(0), scale=1.5)
    total = sum(weight for _, weight in mix.steps)
    for steps, weight in mix.steps:
        drawn = sum(each.steps == steps for each in load) / len(load)
        assert drawn == pytest.approx(weight / total, abs=0.04)
    assert {each.size for each in load} == {size for size, _ in mix.sizes}
    assert {each.scale for each in load} == {1.5}


def test_same_seed_draws_the_same_load() -> None:
    first, second = (
        draw_load(Mix.load("skewed"), poisson(1.0, draw), draw, seconds=100)
        for draw in (random.Random(7), random.Random(7))
    )
    assert first == second
    assert first[-1].at <= 100


def test_own_time_is_that_of_the_request_alone() -> None:
    device = Device.per_row(0.5)
    assert Arrival(0.0, 1024, steps=4).own_s(device) == pytest.approx(2.0 + HANDOFF_S)
    assert Arrival(0.0, 1024, steps=4, guided=True).own_s(device) == pytest.approx(4.0 + HANDOFF_S)


def test_mean_device_time_weighs_sizes_and_steps() -> None:
    mix = Mix("two", "a test", sizes=((512, 1.0),), steps=((2, 3.0), (10, 1.0)))
    assert mix.mean_device_s(Device.per_row(1.0)) == pytest.approx(4.0)


def test_trace_of_gentd26_is_replayed_at_a_rate(tmp_path: Path) -> None:
    path = tmp_path / "lora_request_trace.csv"
    path.write_text(
        HEAD
        + "2024-11-15 16:58:00,TXT_2_IMG,SUCCEED,43.0,G0,93.0,,2.0,40.0,M1,2\n"
        + "2024-11-15 16:57:50,TXT_2_IMG,SUCCEED,32.0,G0,63.0,26.0,1.0,,M0,0\n"
    )
    first, second = read_trace(path)
    assert (first.at, first.steps, first.guided) == (0.0, None, True)
    assert (second.at, second.steps, second.images, second.loras) == (10.0, 40, 2, 2)
    load = replay([first, second], Mix.load("katz"), random.Random(0), rate=0.5, scale=2.0)
    assert [(each.at, each.steps, each.loras) for each in load] == [(0.0, 28, 0), (6.0, 40, 2), (6.0, 40, 2)]


def test_trace_of_katz_is_read(tmp_path: Path) -> None:
    path = tmp_path / "diffusion_model_request_trace.json"
    row = {"timestamp": 1700000000.0, "scene_id": "A", "loras": ["x", "y"]}
    path.write_text(json.dumps([row, {**row, "timestamp": 1700000003.0, "loras": None}]))
    assert [(each.at, each.loras) for each in read_trace(path)] == [(0.0, 2), (3.0, 0)]


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n"], ids=["empty", "other columns"])
def test_other_files_are_no_traces(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(path)


def test_window_is_a_part_with_its_own_clock() -> None:
    load = [Arrival(float(at), 512, steps=at + 1) for at in range(10)]
    assert [(each.at, each.steps) for each in window(load, 2.5, 3.0)] == [(0.5, 4), (1.5, 5), (2.5, 6)]
