"""How a request is cut into forwards, and what happens when a forward does not fit or gives no numbers."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
import torch

from genserve_backend.errors import Cancelled, OutOfMemory, ServerError
from genserve_backend.rerank.handler import RerankHandler
from genserve_backend.rerank.packing import pack
from genserve_backend.rerank.request import RerankRequest, RerankResult
from genserve_backend.rerank.scorers.base import Encoded, Padded, Scorer, TokenSequence
from genserve_backend.worker.engine import Job
from genserve_backend.worker.messages import Event, Progress, Submit


@pytest.mark.parametrize(
    ("lengths", "max_num_seqs", "max_num_batched_tokens", "groups"),
    [
        ([], 4, 100, []),
        ([3], 4, 100, [[0]]),
        ([1, 5, 3], 4, 100, [[1, 2, 0]]),
        ([1, 5, 3], 2, 100, [[1, 2], [0]]),
        ([2, 2, 2, 2], 1, 100, [[0], [1], [2], [3]]),
        ([4, 4, 4], 9, 8, [[0, 1], [2]]),
        ([9, 1, 1], 9, 10, [[0], [1, 2]]),
        ([500, 3, 700], 9, 100, [[2], [0], [1]]),
    ],
    ids=str,
)
def test_pack(lengths: list[int], max_num_seqs: int, max_num_batched_tokens: int, groups: list[list[int]]) -> None:
    assert pack(lengths, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens) == groups


@pytest.mark.parametrize("seed", range(20))
def test_pack_keeps_its_promises(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(1, 600) for _ in range(draw.randint(0, 200))]
    seqs, tokens = draw.randint(1, 40), draw.randint(1, 5_000)
    groups = pack(lengths, max_num_seqs=seqs, max_num_batched_tokens=tokens)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    in_order = [lengths[index] for group in groups for index in group]
    assert in_order == sorted(lengths, reverse=True)
    for group in groups:
        padded = len(group) * max(lengths[index] for index in group)
        assert len(group) <= seqs
        assert padded <= tokens or len(group) == 1


class StubScorer(Scorer):
    """Scores a document by its number of characters; a forward of more than `room` tokens does not fit."""

    def __init__(self, *, room: int = 10**9, leading: int = 0) -> None:
        self.room = room
        self.leading = leading
        self.batches: list[int] = []

    def encode(self, request: RerankRequest, check: Callable[[], None]) -> Encoded:
        texts = [request.query] * self.leading + list(request.documents)
        return Encoded([TokenSequence([len(text)] * len(text), []) for text in texts], leading=self.leading)

    def rows(self, padded: Padded) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, batch: list[TokenSequence]) -> torch.Tensor:
        lengths = [len(sequence.ids) for sequence in batch]
        if len(batch) * max(lengths) > self.room:
            raise torch.OutOfMemoryError("this is what the device says")
        self.batches.append(len(batch))
        return torch.tensor([[length / 100 if length < 99 else float("nan")] for length in lengths])

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[self.leading :, 0]


def run(
    scorer: StubScorer,
    lengths: tuple[int, ...],
    *,
    events: list[Event] | None = None,
    max_num_seqs: int = 100,
    cancel_after: int | None = None,
) -> RerankResult:
    seen = events if events is not None else []

    def emit(event: Event) -> None:
        seen.append(event)
        job.cancelled = len(seen) == cancel_after

    request = RerankRequest("query", tuple("x" * length for length in lengths), None)
    job = Job(Submit(job=1, task_id="t", request=request, deadline=time.monotonic() + 60), emit)
    return RerankHandler(scorer, max_num_seqs=max_num_seqs, max_num_batched_tokens=10_000)(request, job)


LENGTHS = (3, 50, 7, 20, 21, 1, 9)


@pytest.mark.parametrize("leading", [0, 1])
@pytest.mark.parametrize("room", [10**9, 120, 50])
def test_a_forward_that_does_not_fit_is_halved(room: int, leading: int) -> None:
    scorer = StubScorer(room=room, leading=leading)
    events: list[Event] = []
    result = run(scorer, LENGTHS, events=events)
    assert result.scores == pytest.approx([length / 100 for length in LENGTHS])
    assert result.tokens == sum(LENGTHS) + leading * len("query")
    assert sum(scorer.batches) == len(LENGTHS) + leading
    assert (len(scorer.batches) == 1) == (room == 10**9)
    assert events[-1] == Progress(job=1, step=len(LENGTHS), steps=len(LENGTHS))


def test_a_document_that_does_not_fit_alone_is_named() -> None:
    with pytest.raises(OutOfMemory, match=r"DOCUMENTS\[1\] with 50 tokens does not fit"):
        run(StubScorer(room=49), LENGTHS)


def test_a_query_that_does_not_fit_alone_is_named() -> None:
    with pytest.raises(OutOfMemory, match="QUERY with 5 tokens does not fit"):
        run(StubScorer(room=4, leading=1), (1, 2))


def test_what_is_not_a_number_is_no_score() -> None:
    with pytest.raises(ServerError, match=r"no number for 2 of 4 documents, DOCUMENTS\[1\] first"):
        run(StubScorer(), (1, 99, 2, 99))


def test_cancellation_stops_between_forwards() -> None:
    scorer = StubScorer()
    with pytest.raises(Cancelled):
        run(scorer, LENGTHS, max_num_seqs=2, cancel_after=2)
    assert scorer.batches == [2, 2]
