"""Tokenises beside the forward: a thread turns requests into sequences, a slice at a time, urgent ones first."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

from genserve_backend.devices import step_aside
from genserve_backend.errors import RequestError
from genserve_backend.rerank.pool import Ranking
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.score_cache import Score, ScoreCache
from genserve_backend.rerank.scorers.base import Scorer, Slice
from genserve_backend.rerank.scorers.layouts import TokenSequence
from genserve_backend.worker.engine import defect
from genserve_backend.worker.threads import Busy, start_thread

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Known:
    """What is known of a request before it is read."""

    ranking: Ranking
    keys: list[bytes]
    scores: dict[int, Score]


@dataclass(frozen=True)
class Read:
    """A slice of a request's sequences, its end, or what went wrong."""

    ranking: Ranking
    slice: Slice | None = None
    """None at the end."""
    error: RequestError | None = None
    """Then nothing more will come."""


@dataclass(eq=False)
class _Open:
    ranking: Ranking
    slices: Iterator[Slice]


class Reader:
    """Looks up what is known of a request and tokenises the rest, in a thread of its own.

    Args:
        scorer: Whose tokenizer.
        known: Scores of earlier requests.
        put: Where the results go; called by the reader's thread.
    """

    def __init__(self, scorer: Scorer, known: ScoreCache, put: Callable[[Known | Read], None]) -> None:
        # The tokenizer has threads of its own otherwise, which fight the model's for the CPU.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._scorer = scorer
        self._known = known
        self._put = put
        self._inbox: SimpleQueue[Ranking] = SimpleQueue()
        self._open: list[_Open] = []
        self.busy = Busy()
        """Entered for each slice."""
        start_thread(self._run, name="read")

    def submit(self, ranking: Ranking) -> None:
        """Read a request, unless it ends before its turn comes."""
        self._inbox.put(ranking)

    def _run(self) -> None:
        step_aside()
        while True:
            self._hear()
            now = time.monotonic()
            turn = min(self._open, key=lambda each: each.ranking.urgency(now))
            with self.busy:
                read = self._read(turn)
            self._put(read)

    def _hear(self) -> None:
        """Take the requests that came; wait for one where there is nothing else to do."""
        try:
            while True:
                self._begin(self._inbox.get(block=not self._open))
        except Empty:
            pass

    def _begin(self, ranking: Ranking) -> None:
        """Say what is known of a request, and take up the rest."""
        try:
            with self.busy:
                keys = self._known.keys(ranking.request)
                scores = self._known.get(keys)
        except Exception as error:
            self._put(_failed(ranking, error))
            return
        self._put(Known(ranking, keys, scores))
        self._open.append(_Open(ranking, self._slices(ranking.request, scores)))

    def _slices(self, request: RerankRequest, scores: Container[int]) -> Iterator[Slice]:
        """The sequences of the documents that have no score."""
        numbers = [number for number in range(len(request.documents)) if number not in scores]
        if not numbers:
            return
        rest = replace(request, documents=tuple(request.documents[number] for number in numbers))
        for each in self._scorer.read(rest):
            yield replace(each, sequences=[_renumbered(sequence, numbers) for sequence in each.sequences])

    def _read(self, turn: _Open) -> Read:
        try:
            # A request that has ended is of no interest to anyone.
            slice_ = None if turn.ranking.job.end() else next(turn.slices, None)
        except Exception as error:
            self._open.remove(turn)
            return _failed(turn.ranking, error)
        if slice_ is None:
            self._open.remove(turn)
        return Read(turn.ranking, slice_)


def _failed(ranking: Ranking, error: Exception) -> Read:
    """A request that cannot be read costs no other: this thread is every request's."""
    logger.error("request not read", exc_info=error, extra={"fields": {"task_id": ranking.job.submit.task_id}})
    return Read(ranking, error=defect(error))


def _renumbered(sequence: TokenSequence, numbers: Sequence[int]) -> TokenSequence:
    if sequence.document is None or numbers[sequence.document] == sequence.document:
        return sequence
    return replace(sequence, document=numbers[sequence.document])
