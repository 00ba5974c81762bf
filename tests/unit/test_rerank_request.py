"""The limits of a rerank request, and that their messages stay short and say what was wrong."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from genserve_backend.errors import InvalidInput
from genserve_backend.rerank.request import RerankRequest, RerankResult, validate


def request(query: str = "q", documents: tuple[str, ...] = ("d",), instruction: str | None = None) -> RerankRequest:
    return RerankRequest(query, documents, instruction)


@pytest.mark.parametrize(
    "accepted",
    [
        request(),
        request(query="q" * 10_000),
        request(query="\U0001f43c" * 10_000),
        request(documents=("",)),
        request(documents=("d",) * 1_000),
        request(documents=("d" * 1_000_000,)),
        request(instruction=""),
        request(instruction="i" * 10_000),
    ],
    ids=lambda value: f"{len(value.query)}-{len(value.documents)}-{len(value.instruction or '')}",
)
def test_accepts_everything_up_to_the_limits(accepted: RerankRequest) -> None:
    validate(accepted)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (request(query=""), "QUERY is 0 characters long; allowed: 1 to 10,000 characters"),
        (request(query="q" * 12_000), "QUERY is 12,000 characters long; allowed: 1 to 10,000 characters"),
        (request(documents=()), "DOCUMENTS is 0 documents; allowed: 1 to 1,000 documents"),
        (request(documents=("",) * 1_001), "DOCUMENTS is 1,001 documents; allowed: 1 to 1,000 documents"),
        (
            request(documents=("", "", "", "d" * 1_000_001)),
            "DOCUMENTS[3] is 1,000,001 characters long; allowed: 0 to 1,000,000 characters",
        ),
        (
            request(instruction="i" * 10_001),
            "INSTRUCTION is 10,001 characters long; allowed: 0 to 10,000 characters",
        ),
    ],
    ids=lambda value: value.partition(";")[0] if isinstance(value, str) else "",
)
def test_refuses_what_is_beyond_them(refused: RerankRequest, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        validate(refused)
    assert str(caught.value) == message


def test_both_travel_between_processes() -> None:
    result = RerankResult(scores=[0.5], tokens=7, truncated=[], queue_s=0.1, elapsed_time=0.2)
    for value in (request(instruction="i"), result):
        assert pickle.loads(pickle.dumps(value)) == value


def test_needs_no_torch() -> None:
    code = (
        "import sys; import genserve_backend.rerank.request, genserve_backend.rerank.checkpoint; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
