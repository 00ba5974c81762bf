"""The rerank engine: the documents of all requests in one pool, out of which each forward takes what fits.

A request is answered as soon as its own documents are done, whatever else shares their forwards.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import cast

import torch

from genserve_backend.errors import RequestError, ServerError
from genserve_backend.logs import log
from genserve_backend.rerank.pool import Piece, Ranking, choose
from genserve_backend.rerank.reader import Known, Read, Reader
from genserve_backend.rerank.report import Reporter
from genserve_backend.rerank.request import RerankResult
from genserve_backend.rerank.score_cache import Score, ScoreCache
from genserve_backend.rerank.scorers.base import Scorer
from genserve_backend.settings import RerankSettings
from genserve_backend.worker.engine import Emit, Inbox, Job
from genserve_backend.worker.isolate import isolate
from genserve_backend.worker.messages import Cancel, Done, Failed, Grant, Submit

logger = logging.getLogger(__name__)


class RerankEngine:
    """Scores documents, those of many requests at a time.

    Args:
        scorer: The loaded model.
        known: Scores of earlier requests.
        reporter: Progress and counts.
        settings: The other limits.
        emit: Where events go.
        max_num_batched_tokens: Tokens of a forward, at most.
    """

    def __init__(
        self,
        *,
        scorer: Scorer,
        known: ScoreCache,
        reporter: Reporter,
        settings: RerankSettings,
        emit: Emit,
        max_num_batched_tokens: int,
    ) -> None:
        self._scorer = scorer
        self._known = known
        self._reporter = reporter
        self._settings = settings
        self._max_num_batched_tokens = max_num_batched_tokens
        self._emit = emit
        self._inbox: Inbox[Ranking | Cancel | Known | Read] = Inbox()
        self._reader = Reader(scorer, known, self._inbox.put)
        self._rankings: dict[int, Ranking] = {}
        self._asked = 0
        """Requests asked for that have not come; below zero after a restart, which brings some unasked."""

    def submit(self, submit: Submit) -> None:
        """Take a request. It is read at once, not only when the current forward is done."""
        unread = sum(map(len, submit.request.documents))
        ranking = Ranking(Job(submit, self._emit), submit.request, unread=unread)
        self._inbox.put(ranking)
        self._reader.submit(ranking)

    def cancel(self, job_id: int) -> None:
        """Stop working on a request after the current forward. One that is unknown or done is left alone."""
        self._inbox.put(Cancel(job_id))

    def run(self) -> None:
        """Work until the process ends.

        Raises:
            DeviceLost: The device has failed for good.
        """
        while True:
            self.turn()

    @torch.inference_mode()
    def turn(self) -> None:
        """Hear what came, run one forward, answer what is done. Waits for a message where there is nothing to do."""
        self._ask()
        for message in self._inbox.take(wait=not any(ranking.waiting for ranking in self._rankings.values())):
            self._take(message)
        for ranking in list(self._rankings.values()):
            if error := ranking.job.end():
                self._fail(ranking, error)
        pieces = choose(
            self._rankings.values(),
            now=time.monotonic(),
            max_num_seqs=self._settings.max_num_seqs,
            max_num_batched_tokens=self._max_num_batched_tokens,
            padded=not self._scorer.packs,
        )
        if pieces:
            self._forward(pieces)
            for message in self._inbox.take(wait=False):  # which may say that nothing more is to come of a request
                self._take(message)
        for ranking in list(self._rankings.values()):
            if ranking.is_scored:
                self._finish(ranking)
        self._reporter.report(self._rankings.values(), stalled_s=self._reader.busy.seconds)

    # What a turn is made of.

    def _ask(self) -> None:
        """Ask for requests while there is room: enough tokens to choose from, and not too many in memory."""
        held = sum(ranking.tokens_left for ranking in self._rankings.values())
        room = held < self._settings.max_held_batches * self._max_num_batched_tokens
        free = self._settings.max_waiting_requests - len(self._rankings) - max(0, self._asked)
        if room and free > 0:
            self._asked += free
            self._emit(Grant(free))

    def _take(self, message: Ranking | Cancel | Known | Read) -> None:
        if isinstance(message, Ranking):
            self._asked -= 1
            self._rankings[message.job.submit.job] = message
        elif isinstance(message, Cancel):
            if known := self._rankings.get(message.job):
                known.job.cancelled = True
        elif message.ranking.job.submit.job in self._rankings:
            if isinstance(message, Known):
                self._knows(message)
            else:
                self._has_read(message)

    def _knows(self, known: Known) -> None:
        """Some of a request's scores need no forward."""
        ranking = known.ranking
        ranking.keys, ranking.known = known.keys, known.scores
        ranking.documents_done += len(known.scores)
        ranking.unread -= sum(len(ranking.request.documents[number]) for number in known.scores)
        self._reporter.known(len(known.scores))

    def _has_read(self, read: Read) -> None:
        """A slice of a request is tokenised."""
        ranking = read.ranking
        if read.error:
            self._fail(ranking, read.error)
        elif read.slice is None:
            ranking.is_read = True
        else:
            ranking.read(read.slice.sequences, characters=read.slice.characters)
            if read.slice.query_truncated and not ranking.query_truncated:
                ranking.query_truncated = True
                log(logger, logging.WARNING, "query cut to the length limit", task_id=ranking.job.submit.task_id)

    def _forward(self, pieces: Sequence[Piece]) -> None:
        """Run the model on sequences of any requests, and keep what it makes of each."""
        started = time.monotonic()
        for ranking in {piece.ranking for piece in pieces if piece.ranking.started is None}:
            ranking.started = started
            self._reporter.began(started - ranking.job.arrived)
        before = self._scorer.prefix_tokens_read
        rows, failed = isolate(self._run, pieces, name=_name)
        self._reporter.ran(
            pieces,
            seconds=time.monotonic() - started,
            padded=not self._scorer.packs,
            prefix_tokens=self._scorer.prefix_tokens_read - before,
        )
        for piece, row in rows.items():
            piece.ranking.keep(piece, row)
        for piece, error in failed.items():
            self._fail(piece.ranking, error)

    def _run(self, pieces: Sequence[Piece]) -> Sequence[torch.Tensor]:
        return self._scorer.forward([piece.sequence for piece in pieces]).unbind()

    def _finish(self, ranking: Ranking) -> None:
        """Answer a request whose sequences all have their rows."""
        now = time.monotonic()
        job, started = ranking.job, ranking.started or now
        scores = ranking.known | self._scores(ranking)
        if bad := sorted(number for number, score in scores.items() if math.isnan(score.value)):
            self._fail(ranking, _no_number(bad, len(scores)))
            return
        if ranking.keys:
            self._known.put((ranking.keys[number], score) for number, score in scores.items())
        del self._rankings[job.submit.job]
        result = RerankResult(
            scores=[scores[number].value for number in range(len(scores))],
            tokens=sum(len(sequence.ids) for sequence in ranking.sequences),
            truncated=[number for number in range(len(scores)) if scores[number].truncated],
            queue_s=started - job.arrived,
            elapsed_time=now - job.arrived,
        )
        self._emit(Done(job.submit.job, result))

    def _scores(self, ranking: Ranking) -> dict[int, Score]:
        """The scores that the model gives, by document: the highest of its windows."""
        documents = [sequence for sequence in ranking.sequences if sequence.document is not None]
        if not documents:
            return {}
        values = self._scorer.scores(torch.stack([row for row in ranking.rows if row is not None])).tolist()
        scores: dict[int, Score] = {}
        for sequence, value in zip(documents, values, strict=True):
            number = cast("int", sequence.document)
            before = scores.get(number, Score(value, truncated=False))
            # Not max(), which may lose what is not a number.
            is_best = value > before.value or math.isnan(value)
            scores[number] = Score(value if is_best else before.value, before.truncated or sequence.truncated)
        return scores

    def _fail(self, ranking: Ranking, error: RequestError) -> None:
        """Answer a request with an error; one that has been answered already is left alone."""
        if self._rankings.pop(ranking.job.submit.job, None):
            self._emit(Failed(ranking.job.submit.job, error))


def _name(piece: Piece) -> str:
    """A sequence as its caller knows it."""
    return f"{piece.sequence.name} with {piece.length:,} tokens"


def _no_number(bad: Sequence[int], count: int) -> ServerError:
    return ServerError(
        f"the model gave no number for {len(bad)} of {count} documents, DOCUMENTS[{bad[0]}] first; "
        "float16 overflows with some checkpoints, bfloat16 and float32 do not"
    )
