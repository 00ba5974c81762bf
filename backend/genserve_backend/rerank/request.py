"""Rerank requests and results: plain Python values that travel between processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from genserve_backend.errors import InvalidInput

MAX_QUERY_CHARACTERS = 10_000
MAX_INSTRUCTION_CHARACTERS = 10_000
MAX_DOCUMENTS = 1_000
MAX_DOCUMENT_CHARACTERS = 1_000_000
DEFAULT_WINDOWS, MAX_WINDOWS = 1, 64


@dataclass(frozen=True)
class RerankRequest:
    """A query and the documents to score against it."""

    query: str
    """1 to 10,000 characters."""
    documents: tuple[str, ...]
    """1 to 1,000 documents of at most 1,000,000 characters each. An empty document is scored like any other."""
    instruction: str | None
    """At most 10,000 characters; None and "" select the model's own. Models without instructions ignore it."""

    windows: int = DEFAULT_WINDOWS
    """Most overlapping windows, 1 to 64, that a document beyond the length limit is split into. Its score is the
    highest score of its windows. 1 truncates it at the limit."""

    @property
    def work(self) -> float:
        """Estimated cost: characters to tokenize and score."""
        return sum(len(self.query) + len(document) for document in self.documents)


@dataclass(frozen=True)
class RerankResult:
    """The scores of one request."""

    scores: list[float]
    """Relevance from 0 to 1, one per document, in the order of the request."""
    tokens: int
    """Tokens of this request's sequences, including special tokens and excluding padding."""
    truncated: list[int]
    """Ascending indices of the documents that were cut to the length limit."""
    queue_s: float
    """Seconds from its arrival at the instance to its first forward."""
    elapsed_time: float
    """Seconds from its arrival at the instance to its answer."""


def parse(values: Mapping[str, Any]) -> RerankRequest:
    """Check one row of tensors and return its request.

    Args:
        values: Tensor name to str, int or list of str; missing ones get their default.

    Raises:
        InvalidInput: A value is out of range; the message names the tensor, the value and what is allowed.
    """
    query = _text("QUERY", values.get("QUERY", ""), minimum=1, maximum=MAX_QUERY_CHARACTERS)
    texts = values.get("DOCUMENTS", ())
    if not 1 <= len(texts) <= MAX_DOCUMENTS:
        raise InvalidInput.of("DOCUMENTS", f"{len(texts):,} documents", f"1 to {MAX_DOCUMENTS:,} documents")
    documents = tuple(
        _text(f"DOCUMENTS[{index}]", text, minimum=0, maximum=MAX_DOCUMENT_CHARACTERS)
        for index, text in enumerate(texts)
    )
    windows = values.get("WINDOWS", DEFAULT_WINDOWS)
    if not 1 <= windows <= MAX_WINDOWS:
        raise InvalidInput.of("WINDOWS", windows, f"1 to {MAX_WINDOWS}")
    instruction = _text("INSTRUCTION", values.get("INSTRUCTION", ""), minimum=0, maximum=MAX_INSTRUCTION_CHARACTERS)
    return RerankRequest(query, documents, instruction or None, windows)


def _text(tensor: str, value: str, *, minimum: int, maximum: int) -> str:
    if not minimum <= len(value) <= maximum:
        raise InvalidInput.of(tensor, f"{len(value):,} characters long", f"{minimum} to {maximum:,} characters")
    return value
