"""The reranker's comparison and its quality study: verdict and agreement of rankings."""

from __future__ import annotations

import numpy as np
import pytest

from compare.rerank import CONTENDERS, Result, broken_promises, distance
from compare.rerank_load import Timing
from studies.rerank_quality import agreement, paragraphs


def result(seconds: float, latency: float, *scores: float) -> Result:
    return Result([Timing(seconds, [latency], [list(scores)])])


def test_kept_promises_are_not_reported() -> None:
    ours = result(1.0, 0.5, 0.1, 0.9)
    slow = {name: result(2.0, 1.0, 0.1, 0.9) for name in CONTENDERS if not CONTENDERS[name].is_ours}
    assert broken_promises({"genserve": ours, "int8": ours, "bfloat16": ours, **slow}) == []


@pytest.mark.parametrize(
    ("name", "other", "parts"),
    [
        ("naive", result(1.5, 9.0, 0.1, 0.9), ["1.50 times", "one padded forward", "1.8"]),
        ("infinity", result(2.0, 0.6, 0.1, 0.9), ["0.83 times the median latency", "Infinity, torch", "0.7"]),
        ("engine", result(0.9, 0.1, 0.1, 0.9), ["0.90 times", "without Triton", "0.95"]),
        ("vllm", result(9.0, 9.0, 0.1, 0.8), ["scores differ", "vLLM", "1.0e-01"]),
    ],
)
def test_broken_promise_names_ratio_and_contender(name: str, other: Result, parts: list[str]) -> None:
    (broken,) = broken_promises({"genserve": result(1.0, 0.5, 0.1, 0.9), name: other})
    assert all(part in broken for part in parts)


def test_int8_is_compared_with_int8() -> None:
    both = {"genserve": result(9.0, 9.0, 0.1), "infinity-int8": result(1.2, 1.0, 0.2)}
    assert broken_promises(both) == []
    assert broken_promises({**both, "int8": result(1.0, 0.5, 0.15)}) == []
    assert len(broken_promises({**both, "int8": result(1.2, 0.9, 0.15)})) == 2


def test_distance_is_the_largest_difference() -> None:
    assert distance(result(1, 1, 0.1, 0.5), result(1, 1, 0.2, 0.8)) == pytest.approx(0.3)


def test_agreement_is_one_for_equal_and_minus_one_for_reversed_rankings() -> None:
    exact = np.random.default_rng(0).random((3, 50), dtype=np.float32)
    same = agreement(exact, exact + np.float32(0.25))
    assert (same.correlation, same.top) == (pytest.approx(1.0), 1.0)
    assert same.difference == pytest.approx(0.25)
    turned = agreement(exact, -exact)
    assert (turned.correlation, turned.worst_correlation, turned.top) == (pytest.approx(-1.0), pytest.approx(-1.0), 0)


def test_paragraphs_are_many_and_unique() -> None:
    found = paragraphs()
    assert len(found) > 800
    assert len(set(found)) == len(found)
