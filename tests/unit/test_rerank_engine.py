"""The rerank engine with a scorer that needs no model: who shares a forward, who goes first, what failures cost."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from turned_engine import TurnedEngine, count

from genserve_backend.errors import Cancelled, DeadlineExceeded, OutOfMemory, ServerError
from genserve_backend.rerank import report as report_module
from genserve_backend.rerank.engine import RerankEngine
from genserve_backend.rerank.pool import FEW, Piece, Ranking, choose
from genserve_backend.rerank.report import Reporter
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.score_cache import BYTES_PER_SCORE, Score, ScoreCache
from genserve_backend.rerank.scorers.base import Scorer, Slice
from genserve_backend.rerank.scorers.layouts import TokenSequence
from genserve_backend.rerank.scorers.text import windows
from genserve_backend.settings import RerankSettings
from genserve_backend.worker import engine as worker_engine
from genserve_backend.worker.engine import Job
from genserve_backend.worker.messages import Submit

LENGTHS = (3, 50, 7, 20, 21, 1, 9)
SLICE = 4
CUT = 30
"""Documents of this length count as cut."""


class StubScorer(Scorer):
    """Scores a document by its number of characters; a forward of more than `room` tokens does not fit."""

    packs = True
    prefix_tokens_read = 0

    def __init__(self, *, room: int = 10**9, leading: int = 0, hold: threading.Event | None = None) -> None:
        self.room = room
        self.leading = leading
        self.hold = hold
        self.batches: list[list[int]] = []

    def read(self, request: RerankRequest) -> Iterator[Slice]:
        if request.query == "unreadable":
            raise ValueError("this is what the tokenizer says")
        texts = [(None, request.query)] * self.leading + list(enumerate(request.documents))
        for start in range(0, len(texts), SLICE):
            if start and self.hold:
                self.hold.wait(10)
            part = texts[start : start + SLICE]
            sequences = [
                TokenSequence([len(text)] * max(len(text), 1), [], document, truncated=len(text) == CUT)
                for document, text in part
            ]
            yield Slice(sequences, sum(len(text) for document, text in part if document is not None))

    def forward(self, batch: Sequence[TokenSequence]) -> torch.Tensor:
        lengths = [len(sequence.ids) for sequence in batch]
        if sum(lengths) > self.room:
            raise torch.OutOfMemoryError("this is what the device says")
        self.batches.append(lengths)
        return torch.tensor([[length / 1000 if length != 99 else float("nan")] for length in lengths])

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[self.leading :, 0]


def engine(scorer: StubScorer, *, max_num_batched_tokens: int = 10_000, **settings: Any) -> TurnedEngine:
    """An engine that remembers no scores, unless `settings` say so: equal documents are scored again."""
    limits = RerankSettings(model_path="unused", **{"score_cache_bytes": 0, **settings})
    return TurnedEngine(
        lambda emit: RerankEngine(
            scorer=scorer,
            known=ScoreCache(max_bytes=limits.score_cache_bytes),
            reporter=Reporter(device=torch.device("cpu"), emit=emit),
            settings=limits,
            emit=emit,
            max_num_batched_tokens=max_num_batched_tokens,
        )
    )


def request(*lengths: int, query: str = "query") -> RerankRequest:
    return RerankRequest(query, tuple("x" * length for length in lengths), None)


def scores(*lengths: int) -> Any:
    return pytest.approx([max(length, 1) / 1000 for length in lengths])


def ranking(*lengths: int, age: float = 0, level: int = 2) -> Ranking:
    job = Job(Submit(0, "t", request(*lengths), 0.0, level, arrived=-age), lambda event: None)
    made = Ranking(job, job.submit.request, unread=0)
    made.read([TokenSequence([0] * length, [], index) for index, length in enumerate(lengths)], characters=0)
    made.is_read = True
    return made


def chosen(*rankings: Ranking, seqs: int = 100, tokens: int = 100, padded: bool = False) -> list[list[int]]:
    """The lengths taken of each request."""
    pieces = choose(rankings, now=0.0, max_num_seqs=seqs, max_num_batched_tokens=tokens, padded=padded)
    return [[piece.length for piece in pieces if piece.ranking is each] for each in rankings]


def test_the_smaller_request_goes_first() -> None:
    assert chosen(ranking(40, 40, 40, 40), ranking(30, 10)) == [[], [30, 10]]


def test_of_many_requests_the_next_fills_up() -> None:
    large = [ranking(40, 40, 40, 40) for _ in range(FEW)]
    assert chosen(*large, ranking(30, 10)) == [[40], *[[]] * (FEW - 1), [30, 10]]


def test_a_forward_that_finishes_nothing_is_short_while_there_are_few() -> None:
    assert chosen(ranking(*[10] * 20)) == [[10] * 5]
    assert chosen(*[ranking(*[10] * 20) for _ in range(FEW + 1)]) == [[10] * 10, *[[]] * FEW]


def test_a_request_is_finished_only_when_all_of_it_is_read() -> None:
    half = ranking(30, 40)
    half.is_read = False
    assert chosen(half) == [[30]]
    half = ranking(30, 40)
    assert chosen(half) == [[30, 40]]


def test_urgency_can_be_asked_while_sequences_come() -> None:
    """The reader's thread asks while the engine's takes over what was read."""
    growing = ranking(10, 20)

    class Growing(TokenSequence):
        @property
        def length(self) -> int:
            growing.waiting.append(Piece(growing, 2, TokenSequence([0] * 5, [], 2)))
            return 7

    growing.waiting.appendleft(Piece(growing, 3, Growing([0], [], 3)))
    assert growing.tokens_left == 37
    assert len(growing.waiting) == 4


def test_two_small_requests_are_finished_together() -> None:
    assert chosen(ranking(30, 20), ranking(40), ranking(*[10] * 20)) == [[30, 20], [40], []]


def test_age_and_level_make_up_for_size() -> None:
    large, small = [25] * 100, [60]
    assert chosen(ranking(*large), ranking(*small)) == [[], small]
    assert chosen(ranking(*large, age=3), ranking(*small)) == [[25, 25], []]
    assert chosen(ranking(*large, level=1), ranking(*small)) == [[25, 25], []]
    assert chosen(ranking(*large, level=3), ranking(*small, level=2)) == [[], small]


def test_a_sequence_beyond_the_budget_goes_alone() -> None:
    assert chosen(ranking(500), ranking(9, 9, 9, age=-9)) == [[500], []]


def test_padded_rows_are_alike() -> None:
    assert chosen(ranking(10, 30), ranking(9, 25, 31, 2, 2, age=-1), padded=True) == [[30], [25]]
    assert chosen(ranking(5, 5), ranking(*[5] * 50, age=-1), seqs=9, padded=True) == [[5, 5], [5] * 7]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_every_sequence_is_taken_once_and_within_the_limits(seed: int, padded: bool) -> None:
    draw = random.Random(seed)
    rankings = [ranking(*(draw.randint(1, 600) for _ in range(draw.randint(1, 60)))) for _ in range(8)]
    everything = {piece for each in rankings for piece in each.waiting}
    seqs, tokens = draw.randint(1, 40), draw.randint(1, 3_000)
    seen: set[Piece] = set()
    while batch := choose(rankings, now=0.0, max_num_seqs=seqs, max_num_batched_tokens=tokens, padded=padded):
        lengths = [piece.length for piece in batch]
        assert len(batch) <= seqs
        assert (max(lengths) * len(lengths) if padded else sum(lengths)) <= tokens or len(batch) == 1
        assert seen.isdisjoint(batch)
        seen |= set(batch)
    assert seen == everything


@pytest.mark.parametrize("leading", [0, 1])
@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_scores_come_back_in_the_order_of_the_documents(leading: int, budget: int) -> None:
    scorer = StubScorer(leading=leading)
    (result,) = engine(scorer, max_num_batched_tokens=budget).results(request(*LENGTHS))
    assert result.scores == scores(*LENGTHS)
    assert result.tokens == sum(LENGTHS) + leading * len("query")


def test_requests_share_forwards() -> None:
    scorer = StubScorer()
    run = engine(scorer)
    jobs = [run.submit(request(length, length)) for length in (5, 6, 7)]
    time.sleep(0.1)  # for the tokenizer
    assert [run.answer(job).scores for job in jobs] == [scores(5, 5), scores(6, 6), scores(7, 7)]
    assert len(scorer.batches) == 1


def test_a_small_request_does_not_wait_for_a_large_one() -> None:
    scorer = StubScorer()
    run = engine(scorer, max_num_batched_tokens=100)
    large = run.submit(request(*[50] * 400))
    run.turn_until(lambda: len(scorer.batches) > 3)
    small = run.submit(request(10, 20))
    assert run.answer(small).scores == scores(10, 20)
    assert large not in run.answers
    assert len(scorer.batches) < 100
    assert run.answer(large).scores == scores(*[50] * 400)


def test_the_model_starts_before_everything_is_tokenised() -> None:
    hold = threading.Event()
    scorer = StubScorer(hold=hold)
    run = engine(scorer)
    job = run.submit(request(*LENGTHS))
    run.turn_until(lambda: len(scorer.batches) == 1)
    assert len(scorer.batches[0]) == SLICE
    hold.set()
    assert run.answer(job).scores == scores(*LENGTHS)


@pytest.mark.parametrize("leading", [0, 1])
@pytest.mark.parametrize("room", [120, 50])
def test_a_forward_that_does_not_fit_is_halved(room: int, leading: int) -> None:
    scorer = StubScorer(room=room, leading=leading)
    (result,) = engine(scorer).results(request(*LENGTHS))
    assert result.scores == scores(*LENGTHS)
    assert all(sum(batch) <= room for batch in scorer.batches)


def test_a_document_that_does_not_fit_alone_fails_its_request_alone() -> None:
    run = engine(StubScorer(room=49))
    failed, done = run.run(request(3, 50, 7), request(3, 7))
    assert isinstance(failed, OutOfMemory)
    assert "DOCUMENTS[1] with 50 tokens does not fit" in str(failed)
    assert done.scores == scores(3, 7)


def test_a_query_that_does_not_fit_alone_is_named() -> None:
    (failed,) = engine(StubScorer(room=4, leading=1)).run(request(1, 2))
    assert "QUERY with 5 tokens does not fit" in str(failed)


def test_what_is_not_a_number_is_no_score() -> None:
    failed, done = engine(StubScorer()).run(request(1, 99, 2, 99), request(1, 2))
    assert isinstance(failed, ServerError)
    assert "no number for 2 of 4 documents, DOCUMENTS[1] first" in str(failed)
    assert done.scores == scores(1, 2)


def test_a_tokenizer_that_fails_costs_one_request() -> None:
    failed, done = engine(StubScorer()).run(request(1, query="unreadable"), request(1, 2))
    assert isinstance(failed, ServerError)
    assert "ValueError" in str(failed)
    assert done.scores == scores(1, 2)


def test_text_that_cannot_be_hashed_costs_one_request() -> None:
    run = engine(StubScorer(), score_cache_bytes=2**20)
    failed, done = run.run(RerankRequest("query", ("\ud800",), None), request(1, 2))
    assert isinstance(failed, ServerError)
    assert done.scores == scores(1, 2)


def test_cancelling_stops_between_forwards() -> None:
    scorer = StubScorer()
    run = engine(scorer, max_num_batched_tokens=10)
    job = run.submit(request(*[10] * 50))
    run.turn_until(lambda: len(scorer.batches) == 3)
    run.engine.cancel(job)
    assert isinstance(run.answer(job), Cancelled)
    run.turn(20)
    assert len(scorer.batches) == 3


def test_a_request_past_its_deadline_is_given_up() -> None:
    run = engine(StubScorer(), max_num_batched_tokens=10)
    late = run.submit(request(*[10] * 10), within_s=-1)
    assert isinstance(run.answer(late), DeadlineExceeded)
    assert run.results(request(1))[0].scores == scores(1)


def test_it_asks_for_as_much_as_it_wants_to_hold() -> None:
    run = engine(StubScorer(), max_num_batched_tokens=100, max_waiting_requests=5, max_held_batches=2)
    run.turn()
    assert run.granted == 5
    for _ in range(5):
        run.submit(request(*[50] * 40))
    run.turn()
    assert run.granted == 5, "2,000 tokens of each are more than two batches"
    run.turn_until(lambda: len(run.answers) == 5)
    run.turn()
    assert run.granted == 10


def test_beats_count_what_operators_want_to_know() -> None:
    run = engine(StubScorer(leading=1))
    run.results(request(*LENGTHS))
    run.turn_until(lambda: len(run.beats) >= 2)
    assert count(run.beats, "pairs") == len(LENGTHS)
    assert count(run.beats, "tokens") == sum(LENGTHS) + len("query")
    assert count(run.beats, "padding_tokens") == 0
    assert sum(sum(beat.batch_sizes) for beat in run.beats) == sum(LENGTHS) + len("query")


def test_progress_counts_documents() -> None:
    scorer = StubScorer()
    run = engine(scorer, max_num_batched_tokens=10)
    job = run.submit(request(*[10] * 40))
    run.turn_until(lambda: len(scorer.batches) == 5)
    time.sleep(0.6)
    run.turn(2)
    steps = [(event.step, event.steps) for event in run.progress[job]]
    assert steps == sorted(steps)
    assert all(0 <= step <= 40 and steps == 40 for step, steps in steps)


class TwoWindows(StubScorer):
    """Reads every document in two windows."""

    def read(self, request: RerankRequest) -> Iterator[Slice]:
        for part in super().read(request):
            yield replace(part, sequences=[sequence for sequence in part.sequences for _ in range(2)])


def test_a_document_counts_once_all_its_windows_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "PROGRESS_S", 0.0)
    run = engine(TwoWindows(), max_num_batched_tokens=10)
    job = run.submit(request(*[10] * 6))
    run.answer(job)
    steps = [event.step for event in run.progress[job]]
    assert steps == list(range(6)), "one window a forward, so one document every other forward"


def test_the_time_of_a_request_counts_from_its_arrival() -> None:
    run = engine(StubScorer())
    arrived = time.monotonic() - 5.0
    run.engine.submit(Submit(1, "t", request(10), time.monotonic() + 60, arrived=arrived))
    result = run.answer(1)
    assert 5.0 <= result.queue_s <= result.elapsed_time < 10.0


def test_a_slice_that_takes_long_is_told_with_every_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_engine, "BEAT_S", 0.0)
    hold = threading.Event()
    run = engine(StubScorer(hold=hold))
    run.turn()
    assert run.beats[-1].stalled_s == 0.0
    job = run.submit(request(*[1] * (SLICE + 1)))
    run.turn_until(lambda: run.beats[-1].stalled_s > 0.2)
    hold.set()
    run.answer(job)
    run.turn_until(lambda: run.beats[-1].stalled_s == 0.0)


def test_known_scores_need_no_forward() -> None:
    scorer = StubScorer(leading=1)
    run = engine(scorer, score_cache_bytes=2**20)
    run.results(request(10, 20))
    (result,) = run.results(request(20, 30, 10))
    assert result.scores == scores(20, 30, 10)
    assert result.truncated == [1]
    assert scorer.batches[-1] == [len("query"), 30]
    batches = len(scorer.batches)
    (again,) = run.results(request(30, 30, 20))
    assert (again.scores, again.truncated, again.tokens) == (scores(30, 30, 20), [0, 1], 0)
    assert len(scorer.batches) == batches
    run.turn_until(lambda: count(run.beats, "cache_hits") == 5)


def test_a_score_is_known_for_its_query_and_instruction_alone() -> None:
    known = ScoreCache(max_bytes=2**20)
    keys = known.keys(RerankRequest("ab", ("c", "d"), "i"))
    values = [Score(0.1, truncated=False), Score(0.2, truncated=True)]
    known.put(zip(keys, values, strict=True))
    assert known.get(keys) == dict(enumerate(values))
    others = [
        RerankRequest("a", ("bc", "d"), "i"),
        RerankRequest("ab", ("x", "y"), "i"),
        RerankRequest("ab", ("c", "d"), None),
        RerankRequest("i", ("c", "d"), "ab"),
    ]
    for other in others:
        assert known.get(known.keys(other)) == {}


def test_known_scores_stay_within_their_memory() -> None:
    known = ScoreCache(max_bytes=10 * BYTES_PER_SCORE)
    keys = known.keys(request(*range(30)))
    known.put((key, Score(0.5, truncated=False)) for key in keys)
    assert len(known) == 10
    assert set(known.get(keys)) == set(range(20, 30))


class WindowScorer(StubScorer):
    """Reads a document in parts of ten characters; a part scores what its digit says, and zero is no number."""

    def read(self, request: RerankRequest) -> Iterator[Slice]:
        for document, text in enumerate(request.documents):
            parts = [text[start : start + 10] for start in range(0, len(text), 10)]
            read = parts[: request.windows]
            sequences = [TokenSequence([int(part[0])], [], document, truncated=len(read) < len(parts)) for part in read]
            yield Slice(sequences, len(text))

    def forward(self, batch: Sequence[TokenSequence]) -> torch.Tensor:
        return torch.tensor([[sequence.ids[0] / 10 or float("nan")] for sequence in batch])


@pytest.mark.parametrize(("parts", "score", "truncated"), [(1, 0.1, [0]), (2, 0.7, [0]), (3, 0.7, [])])
def test_a_document_is_as_good_as_its_best_window(parts: int, score: float, truncated: list[int]) -> None:
    documents = ("1" * 10 + "7" * 10 + "3" * 5, "2")
    (result,) = engine(WindowScorer()).results(RerankRequest("query", documents, None, windows=parts))
    assert result.scores == pytest.approx([score, 0.2])
    assert result.truncated == truncated


@pytest.mark.parametrize("digits", ["05", "50", "505"])
def test_a_window_that_is_not_a_number_fails_its_request(digits: str) -> None:
    document = "".join(digit * 10 for digit in digits)
    (failed,) = engine(WindowScorer()).run(RerankRequest("query", (document,), None, windows=9))
    assert isinstance(failed, ServerError)


@pytest.mark.parametrize(
    ("length", "room", "at_most", "spans"),
    [
        (0, 8, 4, [(0, 0)]),
        (8, 8, 4, [(0, 8)]),
        (9, 8, 4, [(0, 8), (7, 9)]),
        (30, 16, 9, [(0, 16), (14, 30)]),
        (31, 16, 9, [(0, 16), (14, 30), (28, 31)]),
        (31, 16, 2, [(0, 16), (14, 30)]),
        (5, 1, 9, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),
    ],
    ids=str,
)
def test_windows(length: int, room: int, at_most: int, spans: list[tuple[int, int]]) -> None:
    ids = list(range(length))
    parts = windows(ids, room, at_most=at_most)
    assert [part for part, _ in parts] == [ids[start:end] for start, end in spans]
    assert [truncated for _, truncated in parts] == [False] * (len(spans) - 1) + [spans[-1][1] < length]
