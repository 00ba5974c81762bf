"""The rerank engine on a device that works on queued forwards: order, urgency, cancellation and late failures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from turned_engine import TurnedEngine, count

from genserve_backend.errors import Cancelled, OutOfMemory, ServerError
from genserve_backend.rerank.engine import RerankEngine
from genserve_backend.rerank.metrics import FORWARD_SECONDS, PAIRS, TOKENS
from genserve_backend.rerank.report import Reporter
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.score_cache import ScoreCache
from genserve_backend.rerank.scorers.base import Scorer, Slice
from genserve_backend.rerank.scorers.layouts import TokenSequence
from genserve_backend.rerank.scorers.pending import Pending
from genserve_backend.settings import RerankSettings
from genserve_backend.worker.isolate import DeviceLost

BUDGET = 10


class QueuedForward(Pending):
    """A forward that a device works on until its outputs are asked for."""

    def __init__(self, device: QueueingScorer, lengths: list[int]) -> None:
        super().__init__(torch.tensor([[length / 1000] for length in lengths]))
        self._device = device
        self._lengths = lengths
        self._number = len(device.launched)
        device.launched.append(lengths)
        device.order.append(f"launch {self._number}")

    @property
    def is_done(self) -> bool:
        return False

    def outputs(self) -> torch.Tensor:
        self._device.order.append(f"read {self._number}")
        if error := self._device.late(self._lengths):
            raise error
        return super().outputs()


class QueueingScorer(Scorer):
    """Scores a document by its number of characters.

    Args:
        early: Returns the error that the launch of sequences of these lengths raises.
        late: The same for reading their outputs.
    """

    packs = True

    def __init__(
        self,
        *,
        early: Callable[[list[int]], Exception | None] = lambda lengths: None,
        late: Callable[[list[int]], Exception | None] = lambda lengths: None,
    ) -> None:
        self.early = early
        self.late = late
        self.launched: list[list[int]] = []
        self.order: list[str] = []

    def tokenize(self, request: RerankRequest) -> Iterator[Slice]:
        sequences = [TokenSequence([0] * len(text), [], document) for document, text in enumerate(request.documents)]
        yield Slice(sequences, sum(map(len, request.documents)))

    def forward(self, batch: Sequence[TokenSequence]) -> torch.Tensor:
        return self.launch(batch).outputs()

    def launch(self, batch: Sequence[TokenSequence]) -> Pending:
        lengths = [len(sequence.ids) for sequence in batch]
        if error := self.early(lengths):
            self.order.append("failed launch")
            raise error
        return QueuedForward(self, lengths)

    def scores(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs[:, 0]


def engine(scorer: QueueingScorer) -> TurnedEngine:
    settings = RerankSettings(model_path="unused", score_cache_bytes=0)
    return TurnedEngine(
        lambda emit: RerankEngine(
            scorer=scorer,
            score_cache=ScoreCache(max_bytes=0),
            reporter=Reporter(device=torch.device("cpu"), emit=emit),
            settings=settings,
            emit=emit,
            max_num_batched_tokens=BUDGET,
        )
    )


def request(*lengths: int) -> RerankRequest:
    return RerankRequest("query", tuple("x" * length for length in lengths), None)


def scores(*lengths: int) -> Any:
    return pytest.approx([length / 1000 for length in lengths])


def out_of_memory(room: int) -> Callable[[list[int]], Exception | None]:
    return lambda lengths: torch.OutOfMemoryError("device error") if sum(lengths) > room else None


def test_next_forward_is_launched_before_the_last_one_is_read() -> None:
    scorer = QueueingScorer()
    run = engine(scorer)
    (result,) = run.results(request(*[10] * 4))
    assert result.scores == scores(*[10] * 4)
    launches = [f"launch {number}" for number in range(4)]
    reads = [f"read {number}" for number in range(4)]
    assert scorer.order == [
        launches[0],
        *(step for pair in zip(launches[1:], reads[:-1], strict=True) for step in pair),
        reads[-1],
    ]


def test_last_forward_is_read_without_another_one() -> None:
    scorer = QueueingScorer()
    run = engine(scorer)
    job = run.submit(request(3))
    run.turn_until(lambda: bool(scorer.launched))
    run.turn()
    assert run.answers[job].scores == scores(3)


def test_urgent_request_is_in_the_next_forward() -> None:
    scorer = QueueingScorer()
    run = engine(scorer)
    large = run.submit(request(*[10] * 30))
    run.turn_until(lambda: len(scorer.launched) == 3)
    urgent = run.submit(request(4), level=1)
    time.sleep(0.1)  # for the tokenizer
    run.turn(2)
    assert scorer.launched[3] == [4]
    assert run.answers[urgent].scores == scores(4)
    assert run.answer(large).scores == scores(*[10] * 30)


def test_request_cancelled_while_its_forward_is_queued() -> None:
    scorer = QueueingScorer()
    run = engine(scorer)
    cancelled, other = run.submit(request(6, 10, 10)), run.submit(request(4))
    time.sleep(0.1)  # for the tokenizer
    run.turn(2)
    assert scorer.launched == [[4], [6]]
    assert scorer.order[-1] == "read 0"
    run.engine.cancel(cancelled)
    run.turn()
    assert isinstance(run.answers[cancelled], Cancelled)
    assert run.answers[other].scores == scores(4)
    assert scorer.order[-1] == "read 1"
    run.turn(3)
    assert scorer.launched == [[4], [6]], "its other documents are not scored"
    assert run.results(request(5))[0].scores == scores(5)


def test_out_of_memory_that_shows_late_repeats_only_its_pairs() -> None:
    scorer = QueueingScorer(late=out_of_memory(8))
    run = engine(scorer)
    first, second = run.run(request(5, 5), request(8))
    assert first.scores == scores(5, 5)
    assert second.scores == scores(8)
    assert sorted(map(tuple, scorer.launched)) == [(5,), (5,), (5, 5), (8,)]


def test_item_that_fails_late_fails_only_its_request() -> None:
    scorer = QueueingScorer(late=lambda lengths: ValueError("no such kernel") if 7 in lengths else None)
    run = engine(scorer)
    failed, done, other = run.run(request(7, 2), request(1), request(9))
    assert isinstance(failed, ServerError)
    assert done.scores == scores(1)
    assert other.scores == scores(9)
    assert [9] in scorer.launched
    assert scorer.launched.count([9]) == 1


def test_document_that_runs_out_of_memory_late_is_named() -> None:
    run = engine(QueueingScorer(late=out_of_memory(6)))
    failed, done = run.run(request(2, 7), request(5))
    assert isinstance(failed, OutOfMemory)
    assert "DOCUMENTS[1] with 7 tokens does not fit" in str(failed)
    assert done.scores == scores(5)


def test_failed_launch_is_repeated_after_the_forward_before_it() -> None:
    scorer = QueueingScorer(early=out_of_memory(8))
    run = engine(scorer)
    first = run.submit(request(8))
    run.turn_until(lambda: len(scorer.launched) == 1)
    second = run.submit(request(5, 5))
    time.sleep(0.1)  # for the tokenizer
    assert run.answer(second).scores == scores(5, 5)
    assert run.answers[first].scores == scores(8)
    assert scorer.order == ["launch 0", "failed launch", "read 0", "launch 1", "read 1", "launch 2", "read 2"]


def test_device_lost_late_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    class DeviceError(RuntimeError):
        pass

    monkeypatch.setattr(torch, "AcceleratorError", DeviceError)
    run = engine(QueueingScorer(late=lambda lengths: DeviceError("illegal memory access")))
    run.submit(request(3))
    with pytest.raises(DeviceLost, match="illegal memory access"):
        run.turn_until(lambda: False)


def test_counts_include_repeated_forwards_once() -> None:
    run = engine(QueueingScorer(late=out_of_memory(8)))
    run.run(request(5, 5), request(8), request(3, 3))
    run.turn_until(lambda: count(run.heartbeats, PAIRS) == 5)
    assert count(run.heartbeats, TOKENS) == 24
    assert count(run.heartbeats, FORWARD_SECONDS) > 0
