"""Rerank requests: limits, defaults and error messages."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest

from genserve_backend.errors import InvalidInput
from genserve_backend.rerank.request import RerankRequest, RerankResult, parse

MINIMAL = {"QUERY": "q", "DOCUMENTS": ["d"]}


def test_missing_tensors_get_defaults() -> None:
    assert parse(MINIMAL) == RerankRequest("q", ("d",), None, windows=1)


def test_values_reach_the_request() -> None:
    values = {"QUERY": "q", "DOCUMENTS": ["a", "b"], "INSTRUCTION": "i", "WINDOWS": 3}
    assert parse(values) == RerankRequest("q", ("a", "b"), "i", windows=3)


def test_empty_instruction_selects_the_models_own() -> None:
    assert parse({**MINIMAL, "INSTRUCTION": ""}).instruction is None


@pytest.mark.parametrize(
    "values",
    [
        {"QUERY": "q" * 10_000},
        {"QUERY": "\U0001f43c" * 10_000},
        {"DOCUMENTS": [""]},
        {"DOCUMENTS": ["d"] * 1_000},
        {"DOCUMENTS": ["d" * 1_000_000]},
        {"INSTRUCTION": "i" * 10_000},
        {"WINDOWS": 64},
    ],
    ids=lambda values: next(iter(values)),
)
def test_values_at_the_limits_are_accepted(values: dict[str, Any]) -> None:
    parse({**MINIMAL, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"QUERY": ""}, "QUERY is 0 characters long; allowed: 1 to 10,000 characters"),
        ({"QUERY": "q" * 12_000}, "QUERY is 12,000 characters long; allowed: 1 to 10,000 characters"),
        ({"DOCUMENTS": []}, "DOCUMENTS is 0 documents; allowed: 1 to 1,000 documents"),
        ({"DOCUMENTS": [""] * 1_001}, "DOCUMENTS is 1,001 documents; allowed: 1 to 1,000 documents"),
        (
            {"DOCUMENTS": ["", "", "", "d" * 1_000_001]},
            "DOCUMENTS[3] is 1,000,001 characters long; allowed: 0 to 1,000,000 characters",
        ),
        ({"INSTRUCTION": "i" * 10_001}, "INSTRUCTION is 10,001 characters long; allowed: 0 to 10,000 characters"),
        ({"WINDOWS": 0}, "WINDOWS is 0; allowed: 1 to 64"),
        ({"WINDOWS": 65}, "WINDOWS is 65; allowed: 1 to 64"),
    ],
    ids=lambda value: value.partition(";")[0] if isinstance(value, str) else "",
)
def test_values_beyond_the_limits_are_rejected(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse({**MINIMAL, **values})
    assert str(caught.value) == message


def test_requests_and_results_can_be_pickled() -> None:
    result = RerankResult(scores=[0.5], tokens=7, truncated=[], queue_s=0.1, elapsed_time=0.2)
    for value in (RerankRequest("q", ("d",), "i"), result):
        assert pickle.loads(pickle.dumps(value)) == value


def test_import_needs_no_torch() -> None:
    code = (
        "import sys; import genserve_backend.rerank.request, genserve_backend.rerank.checkpoint, "
        "genserve_backend.rerank.metrics; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
