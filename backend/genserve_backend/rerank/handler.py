"""The reranker's handler: one request after another, its documents in as few forwards as the limits allow."""

from __future__ import annotations

import logging
import math
import time
from collections import deque

import torch

from genserve_backend.errors import OutOfMemory, ServerError
from genserve_backend.logs import log
from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.packing import pack
from genserve_backend.rerank.request import RerankRequest, RerankResult
from genserve_backend.rerank.scorers import load_scorer
from genserve_backend.rerank.scorers.base import Encoded, Scorer
from genserve_backend.settings import RerankSettings
from genserve_backend.worker.engine import Emit, Engine, Job, SerialEngine

logger = logging.getLogger(__name__)


def build(settings: RerankSettings, device: str, emit: Emit) -> Engine:
    """The engine that a worker runs. Raises as `load` does."""
    return SerialEngine(load(settings, device), emit, slots=settings.max_waiting_requests)


def load(settings: RerankSettings, device: str) -> RerankHandler:
    """Load the reranker that `settings` names onto `device` ("cpu", "cuda:0").

    Raises:
        CheckpointError: The checkpoint is missing, incomplete or of a kind that is not served.
    """
    checkpoint = RerankCheckpoint.read(settings.model_path)
    scorer = load_scorer(checkpoint, settings, device)
    log(logger, logging.INFO, "reranker loaded", model=checkpoint.name, kind=checkpoint.kind, device=device)
    return RerankHandler(
        scorer, max_num_seqs=settings.max_num_seqs, max_num_batched_tokens=settings.max_num_batched_tokens
    )


class RerankHandler:
    """Scores the documents of one request.

    Args:
        scorer: The loaded model.
        max_num_seqs: Sequences in one forward, at most.
        max_num_batched_tokens: Tokens in one forward, padding included, at most; one sequence alone may exceed it.
    """

    def __init__(self, scorer: Scorer, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self._scorer = scorer
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens

    def __call__(self, request: RerankRequest, job: Job) -> RerankResult:
        """Score a request that `request.validate` has accepted.

        Raises:
            Cancelled: The caller cancelled.
            DeadlineExceeded: The time is up.
            OutOfMemory: One document alone does not fit into the device's memory.
            ServerError: The model gave something that is not a number.
        """
        queue_s, started = job.waited_s, time.monotonic()
        encoded = self._scorer.encode(request, job.check)
        if encoded.query_truncated:
            log(logger, logging.WARNING, "query cut to the length limit", task_id=job.submit.task_id)
        scores = self._scorer.scores(self._run(encoded, job)).tolist()
        _require_numbers(scores)
        documents = encoded.sequences[encoded.leading :]
        return RerankResult(
            scores=scores,
            tokens=sum(len(sequence.ids) for sequence in encoded.sequences),
            truncated=[index for index, sequence in enumerate(documents) if sequence.truncated],
            queue_s=queue_s,
            elapsed_time=time.monotonic() - started,
        )

    def _run(self, encoded: Encoded, job: Job) -> torch.Tensor:
        """Run all sequences of a request: float32 [sequences, width], in their order."""
        waiting = deque(
            pack(
                [len(sequence.ids) for sequence in encoded.sequences],
                max_num_seqs=self._max_num_seqs,
                max_num_batched_tokens=self._max_num_batched_tokens,
            )
        )
        total, done = len(encoded.sequences) - encoded.leading, 0
        order: list[int] = []
        parts: list[torch.Tensor] = []
        while waiting:
            job.check()
            batch = waiting.popleft()
            rows = self._try(encoded, batch)
            if rows is None:
                waiting.extendleft(reversed(_halves(encoded, batch)))
                continue
            order += batch
            parts.append(rows)
            done += sum(index >= encoded.leading for index in batch)
            job.progress(done, total)
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def _try(self, encoded: Encoded, batch: list[int]) -> torch.Tensor | None:
        """One forward, or None where it did not fit.

        The caller goes on outside of the except clause: while the exception lives, so do the tensors in its frames.
        """
        try:
            return self._scorer.forward([encoded.sequences[index] for index in batch])
        except torch.OutOfMemoryError:
            log(logger, logging.WARNING, "forward out of memory", sequences=len(batch))
            return None


def _halves(encoded: Encoded, batch: list[int]) -> list[list[int]]:
    """Split a batch that did not fit.

    Raises:
        OutOfMemory: It is one sequence already.
    """
    if torch.cuda.is_available():
        # What the failed forward left cached is in pieces of the wrong size for its halves.
        torch.cuda.empty_cache()
    if len(batch) == 1:
        index = batch[0] - encoded.leading
        name = f"DOCUMENTS[{index}]" if index >= 0 else "QUERY"
        tokens = len(encoded.sequences[batch[0]].ids)
        raise OutOfMemory(f"{name} with {tokens:,} tokens does not fit into the device's memory, not even alone")
    middle = (len(batch) + 1) // 2
    return [batch[:middle], batch[middle:]]


def _require_numbers(scores: list[float]) -> None:
    """Raise ServerError if a score is NaN."""
    if bad := [index for index, score in enumerate(scores) if math.isnan(score)]:
        raise ServerError(
            f"the model gave no number for {len(bad)} of {len(scores)} documents, DOCUMENTS[{bad[0]}] first; "
            "float16 overflows with some checkpoints, bfloat16 and float32 do not"
        )
