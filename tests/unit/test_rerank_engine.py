"""The rerank engine with a stub scorer: batching, urgency, caching and failures."""

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
from genserve_backend.rerank.batching import FEW, choose
from genserve_backend.rerank.engine import RerankEngine
from genserve_backend.rerank.metrics import BATCH_TOKENS, CACHE_HITS, PADDING_TOKENS, PAIRS, PREFIX_TOKENS_SAVED, TOKENS
from genserve_backend.rerank.report import Reporter
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.score_cache import BYTES_PER_SCORE, Score, ScoreCache
from genserve_backend.rerank.scorers.base import Scorer, Slice
from genserve_backend.rerank.scorers.layouts import TokenSequence
from genserve_backend.rerank.scorers.text import windows
from genserve_backend.rerank.state import BatchItem, RequestState
from genserve_backend.settings import RerankSettings
from genserve_backend.worker import engine as worker_engine
from genserve_backend.worker import scheduling
from genserve_backend.worker.engine import Job
from genserve_backend.worker.messages import Submit

LENGTHS = (3, 50, 7, 20, 21, 1, 9)
SLICE = 4
CUT = 30
"""Length of the documents that count as truncated."""


class StubScorer(Scorer):
    """Scores a document by its number of characters. A forward of more than `room` tokens runs out of memory."""

    packs = True

    def __init__(self, *, room: int = 10**9, leading: int = 0, hold: threading.Event | None = None) -> None:
        self.room = room
        self.leading = leading
        self.hold = hold
        self.batches: list[list[int]] = []

    def tokenize(self, request: RerankRequest) -> Iterator[Slice]:
        if request.query == "invalid":
            raise ValueError("tokenizer error")
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
            raise torch.OutOfMemoryError("device error")
        self.batches.append(lengths)
        return torch.tensor([[length / 1000 if length != 99 else float("nan")] for length in lengths])

    def scores(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs[self.leading :, 0]


def engine(scorer: StubScorer, *, max_num_batched_tokens: int = 10_000, **settings: Any) -> TurnedEngine:
    """An engine without a score cache, unless `settings` enable it: equal documents are scored again."""
    limits = RerankSettings(model_path="unused", **{"score_cache_bytes": 0, **settings})
    return TurnedEngine(
        lambda emit: RerankEngine(
            scorer=scorer,
            score_cache=ScoreCache(max_bytes=limits.score_cache_bytes),
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


def state(*lengths: int, age: float = 0, level: int = 2) -> RequestState:
    job = Job(Submit(0, "t", request(*lengths), 0.0, level, arrived=-age), lambda event: None)
    made = RequestState(job, job.request, characters_left=0)
    made.add_sequences([TokenSequence([0] * length, [], index) for index, length in enumerate(lengths)], characters=0)
    made.is_tokenized = True
    return made


def chosen(*states: RequestState, seqs: int = 100, tokens: int = 100, padded: bool = False) -> list[list[int]]:
    """The lengths of the chosen sequences, per request."""
    batch = choose(states, now=0.0, max_num_seqs=seqs, max_num_batched_tokens=tokens, padded=padded)
    return [[item.length for item in batch if item.state is each] for each in states]


def test_smaller_request_goes_first() -> None:
    assert chosen(state(40, 40, 40, 40), state(30, 10)) == [[], [30, 10]]


def test_with_many_requests_every_forward_is_filled() -> None:
    large = [state(40, 40, 40, 40) for _ in range(FEW)]
    assert chosen(*large, state(30, 10)) == [[40], *[[]] * (FEW - 1), [30, 10]]


def test_forward_that_finishes_no_request_is_short_while_few_wait() -> None:
    assert chosen(state(*[10] * 20)) == [[10] * 5]
    assert chosen(*[state(*[10] * 20) for _ in range(FEW + 1)]) == [[10] * 10, *[[]] * FEW]


def test_partly_tokenized_request_does_not_count_as_finishing() -> None:
    half = state(30, 40)
    half.is_tokenized = False
    assert chosen(half) == [[30]]
    half = state(30, 40)
    assert chosen(half) == [[30, 40]]


def test_tokens_left_is_thread_safe() -> None:
    """The tokenization thread asks while the engine's thread adds sequences."""
    growing = state(10, 20)

    class Growing(TokenSequence):
        @property
        def length(self) -> int:
            growing.waiting.append(BatchItem(growing, 2, TokenSequence([0] * 5, [], 2)))
            return 7

    growing.waiting.appendleft(BatchItem(growing, 3, Growing([0], [], 3)))
    assert growing.tokens_left == 37
    assert len(growing.waiting) == 4


def test_two_small_requests_finish_in_one_forward() -> None:
    assert chosen(state(30, 20), state(40), state(*[10] * 20)) == [[30, 20], [40], []]


def test_age_and_level_outweigh_size() -> None:
    large, small = [25] * 100, [60]
    assert chosen(state(*large), state(*small)) == [[], small]
    assert chosen(state(*large, age=3), state(*small)) == [[25, 25], []]
    assert chosen(state(*large, level=1), state(*small)) == [[25, 25], []]
    assert chosen(state(*large, level=3), state(*small, level=2)) == [[], small]


def test_sequence_beyond_the_budget_runs_alone() -> None:
    assert chosen(state(500), state(9, 9, 9, age=-9)) == [[500], []]


def test_padded_forward_has_sequences_of_similar_length() -> None:
    assert chosen(state(10, 30), state(9, 25, 31, 2, 2, age=-1), padded=True) == [[30], [25]]
    assert chosen(state(5, 5), state(*[5] * 50, age=-1), seqs=9, padded=True) == [[5, 5], [5] * 7]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_every_sequence_is_chosen_once_and_within_the_limits(seed: int, padded: bool) -> None:
    draw = random.Random(seed)
    states = [state(*(draw.randint(1, 600) for _ in range(draw.randint(1, 60)))) for _ in range(8)]
    everything = {item for each in states for item in each.waiting}
    seqs, tokens = draw.randint(1, 40), draw.randint(1, 3_000)
    seen: set[BatchItem] = set()
    while batch := choose(states, now=0.0, max_num_seqs=seqs, max_num_batched_tokens=tokens, padded=padded):
        lengths = [item.length for item in batch]
        assert len(batch) <= seqs
        assert (max(lengths) * len(lengths) if padded else sum(lengths)) <= tokens or len(batch) == 1
        assert seen.isdisjoint(batch)
        seen |= set(batch)
    assert seen == everything


@pytest.mark.parametrize("leading", [0, 1])
@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_scores_are_in_the_order_of_the_documents(leading: int, budget: int) -> None:
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


def test_small_request_does_not_wait_for_a_large_one() -> None:
    scorer = StubScorer()
    run = engine(scorer, max_num_batched_tokens=100)
    large = run.submit(request(*[50] * 400))
    run.turn_until(lambda: len(scorer.batches) > 3)
    small = run.submit(request(10, 20))
    assert run.answer(small).scores == scores(10, 20)
    assert large not in run.answers
    assert len(scorer.batches) < 100
    assert run.answer(large).scores == scores(*[50] * 400)


def test_first_forward_starts_before_tokenization_ends() -> None:
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
def test_forward_out_of_memory_is_halved(room: int, leading: int) -> None:
    scorer = StubScorer(room=room, leading=leading)
    (result,) = engine(scorer).results(request(*LENGTHS))
    assert result.scores == scores(*LENGTHS)
    assert all(sum(batch) <= room for batch in scorer.batches)


def test_document_out_of_memory_fails_only_its_request() -> None:
    run = engine(StubScorer(room=49))
    failed, done = run.run(request(3, 50, 7), request(3, 7))
    assert isinstance(failed, OutOfMemory)
    assert "DOCUMENTS[1] with 50 tokens does not fit" in str(failed)
    assert done.scores == scores(3, 7)


def test_query_out_of_memory_is_named_in_the_error() -> None:
    (failed,) = engine(StubScorer(room=4, leading=1)).run(request(1, 2))
    assert "QUERY with 5 tokens does not fit" in str(failed)


def test_nan_score_fails_its_request() -> None:
    failed, done = engine(StubScorer()).run(request(1, 99, 2, 99), request(1, 2))
    assert isinstance(failed, ServerError)
    assert "no number for 2 of 4 documents, DOCUMENTS[1] first" in str(failed)
    assert done.scores == scores(1, 2)


def test_tokenizer_failure_fails_only_its_request() -> None:
    failed, done = engine(StubScorer()).run(request(1, query="invalid"), request(1, 2))
    assert isinstance(failed, ServerError)
    assert "ValueError" in str(failed)
    assert done.scores == scores(1, 2)


def test_text_that_cannot_be_hashed_fails_only_its_request() -> None:
    run = engine(StubScorer(), score_cache_bytes=2**20)
    failed, done = run.run(RerankRequest("query", ("\ud800",), None), request(1, 2))
    assert isinstance(failed, ServerError)
    assert done.scores == scores(1, 2)


def test_cancelled_request_stops_between_forwards() -> None:
    scorer = StubScorer()
    run = engine(scorer, max_num_batched_tokens=10)
    job = run.submit(request(*[10] * 50))
    run.turn_until(lambda: len(scorer.batches) == 3)
    run.engine.cancel(job)
    assert isinstance(run.answer(job), Cancelled)
    run.turn(20)
    assert len(scorer.batches) == 3


def test_request_past_its_deadline_fails() -> None:
    run = engine(StubScorer(), max_num_batched_tokens=10)
    late = run.submit(request(*[10] * 10), within_s=-1)
    assert isinstance(run.answer(late), DeadlineExceeded)
    assert run.results(request(1))[0].scores == scores(1)


def test_grants_follow_the_limits_on_held_requests_and_tokens() -> None:
    run = engine(StubScorer(), max_num_batched_tokens=100, max_waiting_requests=5, max_held_batches=2)
    run.turn()
    assert run.granted == 5
    for _ in range(5):
        run.submit(request(*[50] * 40))
    run.turn()
    assert run.granted == 5, "2,000 tokens per request are more than two batches"
    run.turn_until(lambda: len(run.answers) == 5)
    run.turn()
    assert run.granted == 10


def test_heartbeats_carry_the_counts() -> None:
    run = engine(StubScorer(leading=1))
    run.results(request(*LENGTHS))
    run.turn_until(lambda: len(run.heartbeats) >= 2)
    assert count(run.heartbeats, PAIRS) == len(LENGTHS)
    assert count(run.heartbeats, TOKENS) == sum(LENGTHS) + len("query")
    assert count(run.heartbeats, PADDING_TOKENS) == 0
    assert sum(sum(heartbeat.observations[BATCH_TOKENS]) for heartbeat in run.heartbeats) == sum(LENGTHS) + len("query")


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


class ReusingScorer(StubScorer):
    """Reuses three tokens of every sequence."""

    @property
    def prefix_tokens_reused(self) -> int:
        return 3 * sum(map(len, self.batches))


def test_reused_prefix_tokens_count_as_saved() -> None:
    run = engine(ReusingScorer())
    run.results(request(10, 20))
    run.turn_until(lambda: len(run.heartbeats) >= 2)
    assert count(run.heartbeats, TOKENS) == 24
    assert count(run.heartbeats, PREFIX_TOKENS_SAVED) == 6


class TwoWindows(StubScorer):
    """Splits every document into two windows."""

    def tokenize(self, request: RerankRequest) -> Iterator[Slice]:
        for part in super().tokenize(request):
            yield replace(part, sequences=[sequence for sequence in part.sequences for _ in range(2)])


def test_document_is_done_when_all_its_windows_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "PROGRESS_S", 0.0)
    run = engine(TwoWindows(), max_num_batched_tokens=10)
    job = run.submit(request(*[10] * 6))
    run.answer(job)
    steps = [event.step for event in run.progress[job]]
    assert steps == list(range(6)), "one window a forward, so one document every other forward"


def test_times_start_at_the_arrival() -> None:
    run = engine(StubScorer())
    arrived = time.monotonic() - 5.0
    run.engine.submit(Submit(1, "t", request(10), time.monotonic() + 60, arrived=arrived))
    result = run.answer(1)
    assert 5.0 <= result.queue_s <= result.elapsed_time < 10.0


def test_heartbeats_report_a_stalled_tokenization(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_engine, "HEARTBEAT_S", 0.0)
    hold = threading.Event()
    run = engine(StubScorer(hold=hold))
    run.turn()
    assert run.heartbeats[-1].stalled_s == 0.0
    job = run.submit(request(*[1] * (SLICE + 1)))
    run.turn_until(lambda: run.heartbeats[-1].stalled_s > 0.2)
    hold.set()
    run.answer(job)
    run.turn_until(lambda: run.heartbeats[-1].stalled_s == 0.0)


def test_cached_scores_need_no_forward() -> None:
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
    run.turn_until(lambda: count(run.heartbeats, CACHE_HITS) == 5)


def test_cached_score_is_specific_to_query_and_instruction() -> None:
    cache = ScoreCache(max_bytes=2**20)
    keys = cache.keys(RerankRequest("ab", ("c", "d"), "i"))
    values = [Score(0.1, truncated=False), Score(0.2, truncated=True)]
    cache.put(zip(keys, values, strict=True))
    assert cache.get(keys) == dict(enumerate(values))
    others = [
        RerankRequest("a", ("bc", "d"), "i"),
        RerankRequest("ab", ("x", "y"), "i"),
        RerankRequest("ab", ("c", "d"), None),
        RerankRequest("i", ("c", "d"), "ab"),
    ]
    for other in others:
        assert cache.get(cache.keys(other)) == {}


def test_score_cache_evicts_the_oldest_scores() -> None:
    cache = ScoreCache(max_bytes=10 * BYTES_PER_SCORE)
    keys = cache.keys(request(*range(30)))
    cache.put((key, Score(0.5, truncated=False)) for key in keys)
    assert len(cache) == 10
    assert set(cache.get(keys)) == set(range(20, 30))


class WindowScorer(StubScorer):
    """Splits a document into windows of ten characters. The score of a window is its digit; zero gives NaN."""

    def tokenize(self, request: RerankRequest) -> Iterator[Slice]:
        for document, text in enumerate(request.documents):
            parts = [text[start : start + 10] for start in range(0, len(text), 10)]
            used = parts[: request.windows]
            sequences = [TokenSequence([int(part[0])], [], document, truncated=len(used) < len(parts)) for part in used]
            yield Slice(sequences, len(text))

    def forward(self, batch: Sequence[TokenSequence]) -> torch.Tensor:
        return torch.tensor([[sequence.ids[0] / 10 or float("nan")] for sequence in batch])


@pytest.mark.parametrize(("parts", "score", "truncated"), [(1, 0.1, [0]), (2, 0.7, [0]), (3, 0.7, [])])
def test_score_of_a_document_is_that_of_its_best_window(parts: int, score: float, truncated: list[int]) -> None:
    documents = ("1" * 10 + "7" * 10 + "3" * 5, "2")
    (result,) = engine(WindowScorer()).results(RerankRequest("query", documents, None, windows=parts))
    assert result.scores == pytest.approx([score, 0.2])
    assert result.truncated == truncated


@pytest.mark.parametrize("digits", ["05", "50", "505"])
def test_nan_window_fails_its_request(digits: str) -> None:
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
def test_windows_overlap_and_report_truncation(
    length: int, room: int, at_most: int, spans: list[tuple[int, int]]
) -> None:
    ids = list(range(length))
    parts = windows(ids, room, at_most=at_most)
    assert [part for part, _ in parts] == [ids[start:end] for start, end in spans]
    assert [truncated for _, truncated in parts] == [False] * (len(spans) - 1) + [spans[-1][1] < length]
