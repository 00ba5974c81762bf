"""Rankings in int8 and bfloat16 against float32, with real weights. perf/studies/rerank_quality.py uses all texts."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from genserve_backend.matrices import has_int8
from studies.rerank_quality import agreement, paragraphs, scores

EVERY = 6


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return paragraphs()[::EVERY]


@pytest.fixture(scope="module")
def exact(documents: list[str]) -> NDArray[np.float32]:
    return scores("float32", documents)


@pytest.mark.skipif(not has_int8(), reason="this CPU has no VNNI")
def test_int8_keeps_the_order(documents: list[str], exact: NDArray[np.float32]) -> None:
    found = agreement(exact, scores("int8", documents))
    assert found.correlation > 0.995
    assert found.worst_correlation > 0.99
    assert found.top >= 0.9
    assert 1e-4 < found.difference < 0.03


def test_bfloat16_keeps_the_order(documents: list[str], exact: NDArray[np.float32]) -> None:
    found = agreement(exact, scores("bfloat16", documents))
    assert found.worst_correlation > 0.999
    assert 1e-5 < found.difference < 0.01
