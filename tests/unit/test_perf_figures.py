"""Figures of a load, and their plots."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from common.figures import (
    Interval,
    Outcome,
    concurrency_efficiency,
    failures,
    goodput,
    interval,
    load_balance,
    percentile,
)
from common.plots import Panel, line_plot


def outcome(latency_s: float, *, deadline_s: float | None = 2.0, error: str = "") -> Outcome:
    return Outcome(0.0, latency_s, own_s=1.0, deadline_s=deadline_s, steps=4, error=error)


def test_goodput_counts_late_and_failed_requests_as_missed() -> None:
    outcomes = [outcome(1.9), outcome(2.0), outcome(2.1), outcome(0.1, error="QueueFull"), outcome(99, deadline_s=None)]
    assert goodput(outcomes) == 3 / 5


@pytest.mark.parametrize(("percent", "value"), [(0, 1), (50, 2), (75, 3), (76, 4), (99, 4), (100, 4)], ids=str)
def test_percentile_is_one_of_the_values(percent: float, value: float) -> None:
    assert percentile([4, 2, 1, 3], percent) == value


def test_percentile_of_nothing_is_unknown() -> None:
    assert math.isnan(percentile([], 50))


@pytest.mark.parametrize(
    ("shares", "balance"), [([2, 2, 2], 1.0), ([3, 3, 2, 2], 0.8), ([4, 0], 0.0), ({"a": 1, "b": 3}, 0.5)]
)
def test_load_balance_is_the_worst_share_over_the_mean(shares: dict[str, float] | list[float], balance: float) -> None:
    assert load_balance(shares) == balance


def test_efficiency_is_the_work_over_what_was_possible() -> None:
    # 10 requests of 1 s on 4 devices that run one at a time take 3 s.
    assert concurrency_efficiency(10.0, 4, 3.0) == pytest.approx(0.833, abs=1e-3)


def test_interval_is_that_of_student() -> None:
    found = interval([10.0, 12.0, 11.0, 13.0, 14.0])
    assert found.mean == 12.0
    assert found.half == pytest.approx(1.963, abs=1e-3)  # 2.776 x 1.581 / sqrt(5)
    assert (found.low, found.high) == (found.mean - found.half, found.mean + found.half)
    assert f"{Interval(0.5, 0.012):.1%}" == "50.0 ± 1.2 %"
    assert math.isnan(interval([1.0]).half)
    assert f"{interval([0.5]):.0%}" == "50 %"


def test_failures_are_counted_by_kind() -> None:
    assert failures(["", "QueueFull", "", "QueueFull", "Cancelled"]) == {"QueueFull": 2, "Cancelled": 1}


def test_plot_is_written_as_png_and_svg(tmp_path: Path) -> None:
    panel = Panel("a load", {"ours": {1.0: Interval(0.5, 0.1), 2.0: Interval(0.9, math.nan)}})
    files = line_plot(tmp_path / "plots" / "plot", [panel, panel], title="Simulated", x="deadline", y="share")
    assert [file.name for file in files] == ["plot.png", "plot.svg"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    first = files[1].read_bytes()
    line_plot(tmp_path / "plots" / "plot", [panel, panel], title="Simulated", x="deadline", y="share")
    assert files[1].read_bytes() == first
