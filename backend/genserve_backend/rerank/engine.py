"""The rerank engine: batches of documents from any requests.

Every forward takes sequences from the requests in the engine. A request is done with the last of its own documents,
whatever other requests share their forwards.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch

from genserve_backend.errors import RequestError, ServerError
from genserve_backend.logs import log
from genserve_backend.rerank.batching import choose
from genserve_backend.rerank.report import Reporter
from genserve_backend.rerank.request import RerankResult
from genserve_backend.rerank.score_cache import Score, ScoreCache
from genserve_backend.rerank.scorers.base import Scorer
from genserve_backend.rerank.scorers.pending import Pending
from genserve_backend.rerank.state import BatchItem, RequestState
from genserve_backend.rerank.tokenization import CacheHits, Tokenization, Tokenized
from genserve_backend.settings import RerankSettings
from genserve_backend.worker.engine import Emit, Inbox, Job
from genserve_backend.worker.isolate import attempt, isolate
from genserve_backend.worker.messages import Cancel, Grant, Submit
from genserve_backend.worker.scheduling import GrantCounter

logger = logging.getLogger(__name__)


class RerankEngine:
    """Reranking engine that scores the documents of many requests at a time.

    Args:
        scorer: The loaded model.
        score_cache: Scores of earlier requests.
        reporter: Reports progress and metrics.
        settings: The limits.
        max_num_batched_tokens: Tokens of a forward, at most.
        emit: Receives the events.
    """

    def __init__(
        self,
        *,
        scorer: Scorer,
        score_cache: ScoreCache,
        reporter: Reporter,
        settings: RerankSettings,
        max_num_batched_tokens: int,
        emit: Emit,
    ) -> None:
        self._scorer = scorer
        self._score_cache = score_cache
        self._reporter = reporter
        self._settings = settings
        self._max_num_batched_tokens = max_num_batched_tokens
        self._emit = emit
        self._inbox: Inbox[RequestState | Cancel | CacheHits | Tokenized] = Inbox()
        self._tokenization = Tokenization(scorer, score_cache, self._inbox.put)
        self._grants = GrantCounter()
        self._states: dict[int, RequestState] = {}
        self._launched: Launched | None = None
        """The forward whose outputs are not read yet. Only a GPU has one between two turns."""
        self._outputs_read = 0.0
        """Time at which the last outputs were read, on the clock of time.monotonic()."""

    def submit(self, submit: Submit) -> None:
        """Accept a request. Its tokenization starts at once, alongside the current forward."""
        characters = sum(map(len, submit.request.documents))
        state = RequestState(Job(submit, self._emit), submit.request, characters_left=characters)
        self._inbox.put(state)
        self._tokenization.submit(state)

    def cancel(self, job_id: int) -> None:
        """Stop working on a request after the current forward. Ignore one that is unknown or done."""
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
        """Receive messages, run one forward, send results and report. Wait for a message if there is no work.

        A GPU gets the next forward before the outputs of the last one are read, so that it never waits for the host.
        It is never more than one forward ahead: urgent requests would have to wait for those.
        """
        self._grant()
        has_work = self._launched is not None or any(state.waiting for state in self._states.values())
        self._receive(wait=not has_work)
        self._drop_stopped()
        batch = choose(
            self._states.values(),
            now=time.monotonic(),
            max_num_seqs=self._settings.max_num_seqs,
            max_num_batched_tokens=self._max_num_batched_tokens,
            padded=not self._scorer.packs,
        )
        before, self._launched = self._launched, self._launch(batch) if batch else None
        if before:
            self._read(before)
        if self._launched and self._launched.is_done:
            self._read(self._launched)
            self._launched = None
        if batch or before:
            self._receive(wait=False)  # perhaps the end of a request's sequences
        for state in list(self._states.values()):
            if state.is_scored:
                self._finish(state)
        self._reporter.report(self._states.values(), stalled_s=self._tokenization.busy.seconds)

    # The parts of a turn.

    def _grant(self) -> None:
        """Ask for requests unless there are enough tokens to choose from, or too many requests in memory."""
        tokens = sum(state.tokens_left for state in self._states.values())
        if tokens >= self._settings.max_held_batches * self._max_num_batched_tokens:
            return
        count = self._settings.max_waiting_requests - len(self._states) - self._grants.outstanding
        if count > 0:
            self._grants.granted(count)
            self._emit(Grant(count))

    def _receive(self, *, wait: bool) -> None:
        for message in self._inbox.receive(wait=wait):
            if isinstance(message, RequestState):
                self._grants.arrived()
                self._states[message.job.id] = message
            elif isinstance(message, Cancel):
                if state := self._states.get(message.job_id):
                    state.job.cancel()
            elif message.state.job.id not in self._states:
                pass  # the request has failed meanwhile
            elif isinstance(message, CacheHits):
                message.state.add_hits(message.cache_keys, message.scores)
                self._reporter.cached(len(message.scores))
            else:
                self._add_slice(message)

    def _add_slice(self, tokenized: Tokenized) -> None:
        state = tokenized.state
        if tokenized.error:
            self._fail(state, tokenized.error)
        elif tokenized.slice is None:
            state.is_tokenized = True
        else:
            state.add_sequences(tokenized.slice.sequences, characters=tokenized.slice.characters)
            if tokenized.slice.query_truncated and not state.query_truncated:
                state.query_truncated = True
                log(logger, logging.WARNING, "query cut to the length limit", task_id=state.job.task_id)

    def _drop_stopped(self) -> None:
        """Fail cancelled and late requests."""
        for state in list(self._states.values()):
            if error := state.job.stop_reason():
                self._fail(state, error)

    def _launch(self, batch: Sequence[BatchItem]) -> Launched:
        """Start a forward for `batch`."""
        started = time.monotonic()
        for state in {item.state for item in batch if not item.state.has_started}:
            state.started = started
            self._reporter.started(started - state.job.arrived)
        before = PrefixTokens.of(self._scorer)
        result = attempt(self._start_forward, batch)
        return Launched(batch, started, result, PrefixTokens.of(self._scorer).since(before))

    def _read(self, launched: Launched) -> None:
        """Wait for the outputs of a forward and store them. If it has failed, repeat it in halves."""
        remaining = [launched.outputs]

        def forward(batch: Sequence[BatchItem]) -> Sequence[torch.Tensor]:
            if remaining:
                return remaining.pop()()
            return self._start_forward(batch).outputs().unbind()

        before = PrefixTokens.of(self._scorer)
        outputs, failed = isolate(forward, launched.batch, name=lambda item: item.name)
        repeated = PrefixTokens.of(self._scorer).since(before)
        now = time.monotonic()
        self._reporter.stepped(
            launched.batch,
            seconds=now - max(launched.started, self._outputs_read),
            padded=not self._scorer.packs,
            prefix_tokens_computed=launched.prefix_tokens.computed + repeated.computed,
            prefix_tokens_reused=launched.prefix_tokens.reused + repeated.reused,
        )
        self._outputs_read = now
        for item, error in failed.items():
            self._fail(item.state, error)
        for item, output in outputs.items():
            item.state.add_output(item, output)

    def _start_forward(self, batch: Sequence[BatchItem]) -> Pending:
        return self._scorer.launch([item.sequence for item in batch])

    def _finish(self, state: RequestState) -> None:
        """Send the result of a request whose sequences all have their outputs."""
        now = time.monotonic()
        started = now if state.started is None else state.started
        scores = state.hits | self._scores(state)
        if nans := sorted(document for document, score in scores.items() if math.isnan(score.value)):
            self._fail(state, _not_a_number(nans, len(scores)))
            return
        if state.cache_keys:
            self._score_cache.put((state.cache_keys[document], score) for document, score in scores.items())
        self._forget(state)
        state.job.done(
            RerankResult(
                scores=[scores[document].value for document in range(len(scores))],
                tokens=sum(len(sequence.ids) for sequence in state.sequences),
                truncated=[document for document in range(len(scores)) if scores[document].truncated],
                queue_s=started - state.job.arrived,
                elapsed_time=now - state.job.arrived,
            )
        )

    def _scores(self, state: RequestState) -> dict[int, Score]:
        """Return the scores computed by the model, by document: the highest of its windows."""
        sequences = [sequence for sequence in state.sequences if sequence.document is not None]
        if not sequences:
            return {}
        outputs = torch.stack([output for output in state.outputs if output is not None])
        scores: dict[int, Score] = {}
        for sequence, value in zip(sequences, self._scorer.scores(outputs).tolist(), strict=True):
            document = cast("int", sequence.document)
            before = scores.get(document, Score(value, truncated=False))
            # Not max(), which may drop a NaN.
            is_best = value > before.value or math.isnan(value)
            scores[document] = Score(value if is_best else before.value, before.truncated or sequence.truncated)
        return scores

    def _fail(self, state: RequestState, error: RequestError) -> None:
        """Send an error, unless the request has failed already: several of its sequences may."""
        if state.job.id in self._states:
            self._forget(state)
            state.job.fail(error)

    def _forget(self, state: RequestState) -> None:
        del self._states[state.job.id]


@dataclass(frozen=True)
class Launched:
    """A forward whose outputs are not read yet."""

    batch: Sequence[BatchItem]
    started: float
    """On the clock of time.monotonic()."""
    result: Pending | Exception
    """The exception, if not even the launch succeeded."""
    prefix_tokens: PrefixTokens
    """Those of the launch."""

    @property
    def is_done(self) -> bool:
        """True if reading its outputs does not wait for a device."""
        return isinstance(self.result, Exception) or self.result.is_done

    def outputs(self) -> Sequence[torch.Tensor]:
        """Wait for the outputs and return them, one per item.

        Raises:
            Exception: The launch has failed, or the forward.
        """
        if isinstance(self.result, Exception):
            raise self.result
        return self.result.outputs().unbind()


class PrefixTokens(NamedTuple):
    """A scorer's counters of prefix tokens."""

    computed: int
    reused: int

    @classmethod
    def of(cls, scorer: Scorer) -> PrefixTokens:
        """Return the present values."""
        return cls(scorer.prefix_tokens_computed, scorer.prefix_tokens_reused)

    def since(self, before: PrefixTokens) -> PrefixTokens:
        """Return the difference from earlier values."""
        return PrefixTokens(self.computed - before.computed, self.reused - before.reused)


def _not_a_number(documents: Sequence[int], count: int) -> ServerError:
    return ServerError(
        f"the model gave no number for {len(documents)} of {count} documents, DOCUMENTS[{documents[0]}] first; "
        "float16 overflows with some checkpoints, bfloat16 and float32 do not"
    )
