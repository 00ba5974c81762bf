"""The study of skipped steps: difference of images and verdict."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from studies.flux_step_cache import Comparison, Made, Run, broken_promises, compare, psnr_db

GOOD = Comparison(gain=1.5, skipped_steps=10.0, median_db=35.0, worst_db=25.0, adherence=0.85, adherence_without=0.86)


def test_psnr_is_that_of_the_mean_squared_error() -> None:
    black = np.zeros((4, 4, 3), dtype=np.uint8)
    assert psnr_db(black, black) == float("inf")
    assert psnr_db(black, black + 255) == 0.0
    assert psnr_db(black + 10, black) == pytest.approx(20 * np.log10(25.5))


def test_comparison_is_of_the_same_images() -> None:
    levels = [np.full((2, 2, 3), level, dtype=np.uint8) for level in (0, 255, 100, 110)]
    plain = Run([Made(levels[0], 0, fitting=True), Made(levels[2], 0, fitting=True)], seconds=3.0)
    cached = Run([Made(levels[1], 8, fitting=False), Made(levels[3], 6, fitting=True)], seconds=2.0)
    found = compare(plain, cached)
    assert (found.gain, found.skipped_steps, found.adherence, found.adherence_without) == (1.5, 7, 0.5, 1.0)
    assert found.worst_db == 0.0
    assert found.median_db == pytest.approx(10 * np.log10(25.5))


def test_good_setting_breaks_no_promise() -> None:
    assert broken_promises(GOOD) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [({"gain": 1.39}, "throughput"), ({"median_db": 29.9}, "PSNR"), ({"adherence": 0.83}, "adherence")],
    ids=["slow", "far", "wrong"],
)
def test_each_broken_promise_is_told(change: dict[str, float], told: str) -> None:
    (line,) = broken_promises(replace(GOOD, **change))
    assert line.startswith(told)
