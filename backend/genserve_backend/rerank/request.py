"""What goes into the reranker and what comes out, in plain Python values that travel between processes."""

from __future__ import annotations

from dataclasses import dataclass

from genserve_backend.errors import InvalidInput

MAX_QUERY_CHARACTERS = 10_000
MAX_INSTRUCTION_CHARACTERS = 10_000
MAX_DOCUMENTS = 1_000
MAX_DOCUMENT_CHARACTERS = 1_000_000
MAX_WINDOWS = 64


@dataclass(frozen=True)
class RerankRequest:
    """One query and the documents to score against it."""

    query: str
    """1 to 10,000 characters."""
    documents: tuple[str, ...]
    """1 to 1,000 documents of at most 1,000,000 characters each; an empty one is scored like any other."""
    instruction: str | None
    """At most 10,000 characters; None and "" stand for the model's own. Models without instructions ignore it."""

    windows: int = 1
    """Overlapping parts, 1 to 64, in which a document beyond the length limit is read at most; its score is the highest
    of theirs. 1 cuts it at the limit."""

    @property
    def work(self) -> float:
        """What it costs, in characters to read."""
        return sum(len(self.query) + len(document) for document in self.documents)


@dataclass(frozen=True)
class RerankResult:
    """The scores of one request."""

    scores: list[float]
    """Relevance in 0 to 1, one for every document, in the order of the request."""
    tokens: int
    """Tokens that the model read for this request, special tokens included, padding not."""
    truncated: list[int]
    """Ascending indices of the documents that were cut to the length limit."""
    queue_s: float
    """Seconds from its arrival at the instance to its first forward."""
    elapsed_time: float
    """Seconds from its arrival at the instance to its answer."""


def validate(request: RerankRequest) -> None:
    """Check a request against the limits.

    Raises:
        InvalidInput: Something is too short, too long or too many; the message names the tensor and its size.
    """
    _check_length("QUERY", request.query, at_least=1, at_most=MAX_QUERY_CHARACTERS)
    count = len(request.documents)
    if not 1 <= count <= MAX_DOCUMENTS:
        raise InvalidInput.of("DOCUMENTS", f"{count:,} documents", f"1 to {MAX_DOCUMENTS:,} documents")
    for index, document in enumerate(request.documents):
        _check_length(f"DOCUMENTS[{index}]", document, at_least=0, at_most=MAX_DOCUMENT_CHARACTERS)
    if not 1 <= request.windows <= MAX_WINDOWS:
        raise InvalidInput.of("WINDOWS", request.windows, f"1 to {MAX_WINDOWS}")
    _check_length("INSTRUCTION", request.instruction or "", at_least=0, at_most=MAX_INSTRUCTION_CHARACTERS)


def _check_length(tensor: str, text: str, *, at_least: int, at_most: int) -> None:
    if not at_least <= len(text) <= at_most:
        raise InvalidInput.of(tensor, f"{len(text):,} characters long", f"{at_least} to {at_most:,} characters")
