"""Tokenization alongside the forwards: a thread that looks up cached scores and tokenizes the rest, slice by slice."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

from genserve_backend.devices import limit_threads
from genserve_backend.errors import RequestError
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.score_cache import Score, ScoreCache
from genserve_backend.rerank.scorers.base import Scorer, Slice
from genserve_backend.rerank.scorers.layouts import TokenSequence
from genserve_backend.rerank.state import RequestState
from genserve_backend.worker.engine import defect
from genserve_backend.worker.threads import Busy, start_thread

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheHits:
    """The cached scores of a request, sent before its first slice."""

    state: RequestState
    cache_keys: list[bytes]
    scores: dict[int, Score]
    """By document."""


@dataclass(frozen=True)
class Tokenized:
    """A slice of a request's sequences, the end of them, or an error."""

    state: RequestState
    slice: Slice | None = None
    """None at the end."""
    error: RequestError | None = None
    """Set if the request failed; nothing follows."""


@dataclass(eq=False)
class _Open:
    """A request that is being tokenized."""

    state: RequestState
    slices: Iterator[Slice]


class Tokenization:
    """A thread that tokenizes requests, the most urgent one first.

    Args:
        scorer: Its tokenizer is used.
        score_cache: Scores of earlier requests.
        put: Receives the results, in the tokenization thread.
    """

    def __init__(self, scorer: Scorer, score_cache: ScoreCache, put: Callable[[CacheHits | Tokenized], None]) -> None:
        # Threads of the tokenizer's own would compete with the model's for the CPU.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._scorer = scorer
        self._score_cache = score_cache
        self._put = put
        self._inbox: SimpleQueue[RequestState] = SimpleQueue()
        self._open: list[_Open] = []
        self.busy = Busy()
        """Entered for each slice."""
        start_thread(self._run, name="tokenize")

    def submit(self, state: RequestState) -> None:
        """Queue a request. It is skipped if it is cancelled or late before its turn."""
        self._inbox.put(state)

    def _run(self) -> None:
        limit_threads()
        while True:
            self._receive()
            now = time.monotonic()
            most_urgent = min(self._open, key=lambda each: each.state.urgency(now))
            with self.busy:
                tokenized = self._tokenize(most_urgent)
            self._put(tokenized)

    def _receive(self) -> None:
        """Receive new requests; wait for one if none is open."""
        try:
            while True:
                self._begin(self._inbox.get(block=not self._open))
        except Empty:
            pass

    def _begin(self, state: RequestState) -> None:
        """Send the cached scores of a request and open the rest of it."""
        try:
            with self.busy:
                cache_keys = self._score_cache.keys(state.request)
                scores = self._score_cache.get(cache_keys)
        except Exception as error:
            self._put(_failed(state, error))
            return
        self._put(CacheHits(state, cache_keys, scores))
        self._open.append(_Open(state, self._slices(state.request, cached=scores)))

    def _slices(self, request: RerankRequest, *, cached: Container[int]) -> Iterator[Slice]:
        """Yield the sequences of the documents without a cached score."""
        documents = [document for document in range(len(request.documents)) if document not in cached]
        if not documents:
            return
        rest = replace(request, documents=tuple(request.documents[document] for document in documents))
        for each in self._scorer.tokenize(rest):
            yield replace(each, sequences=[_renumbered(sequence, documents) for sequence in each.sequences])

    def _tokenize(self, opened: _Open) -> Tokenized:
        """Return the next slice of a request; its end if the request is cancelled or late."""
        try:
            slice_ = None if opened.state.job.stop_reason() else next(opened.slices, None)
        except Exception as error:
            self._open.remove(opened)
            return _failed(opened.state, error)
        if slice_ is None:
            self._open.remove(opened)
        return Tokenized(opened.state, slice_)


def _failed(state: RequestState, error: Exception) -> Tokenized:
    """Return the failure of one request; the thread goes on with the others."""
    logger.error("tokenization failed", exc_info=error, extra={"fields": {"task_id": state.job.task_id}})
    return Tokenized(state, error=defect(error))


def _renumbered(sequence: TokenSequence, documents: Sequence[int]) -> TokenSequence:
    if sequence.document is None or documents[sequence.document] == sequence.document:
        return sequence
    return replace(sequence, document=documents[sequence.document])
