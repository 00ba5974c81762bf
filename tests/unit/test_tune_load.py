"""The loads of `genserve tune`, measured with fake servers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from fake_servers import FakeServer, after, image, scores

from genserve import AsyncClient
from genserve.errors import OutOfMemory
from genserve.map_files import FileProblem
from genserve.protocol import Call, Outputs
from genserve.tune.load import Load, Sample, TrialFailed, drive, file_load, image_load, rerank_load


def measure(server: FakeServer, load: Load, *, count: int = 8, limit_s: float = 20.0) -> Sample:
    async def run() -> Sample:
        async with AsyncClient(transport=server, timeout=60.0) as client:
            return await drive(client, load, load.block(0, count), limit_s=limit_s)

    return asyncio.run(run())


def answering(answer: Any, seconds: float = 0.0) -> FakeServer:
    async def answered(call: Call) -> Outputs:
        await asyncio.sleep(seconds)
        return answer(call)

    server = FakeServer()
    server.always = answered
    return server


def test_blocks_share_no_request_and_repeat_exactly() -> None:
    for load in (
        image_load(in_flight=2, sizes=[(64, 128), (128, 64)], steps=3),
        rerank_load(in_flight=2, documents=3, length=10),
    ):
        first, second = load.block(0, 4), load.block(1, 4)
        assert first == load.block(0, 4)
        assert not [each for each in second if each in first]
    shapes = [
        (each["width"], each["height"], each["steps"])
        for each in image_load(in_flight=2, sizes=[(64, 128), (128, 64)], steps=3).block(0, 3)
    ]
    assert shapes == [(64, 128, 3), (128, 64, 3), (64, 128, 3)]
    assert set(image_load(in_flight=1, sizes=[], steps=None).request(0)) == {"prompt", "seed"}


def test_documents_have_the_length_that_was_asked_for() -> None:
    requests = rerank_load(in_flight=1, documents=50, length=20).block(0, 4)
    words = [len(text.split()) for each in requests for text in each["documents"]]
    assert (min(words), max(words)) == (10, 30)


def test_closed_loop_keeps_its_requests_in_flight() -> None:
    server = answering(image, 0.01)
    sample = measure(server, image_load(in_flight=3, sizes=[], steps=1))
    assert server.most_running == 3
    assert len(server.calls) == len(sample.latencies) == sample.units == 8
    assert min(sample.latencies) >= 0.01
    assert sample.rate == pytest.approx(8 / sample.seconds)
    assert min(sample.latencies) <= sample.percentile(95) <= max(sample.latencies)


def test_documents_are_the_units_of_rankings() -> None:
    sample = measure(answering(scores), rerank_load(in_flight=2, documents=5, length=3))
    assert sample.units == 8 * 5


def test_rate_sends_requests_whatever_was_answered() -> None:
    server = answering(image, 0.5)
    measure(server, image_load(in_flight=1, sizes=[], steps=1, rate=1000.0), count=10)
    assert server.most_running == 10


def test_failed_request_ends_the_block() -> None:
    server = answering(image)
    server.script = [after(0.0), OutOfMemory("no room")]
    with pytest.raises(TrialFailed, match="OutOfMemory: no room"):
        measure(server, image_load(in_flight=1, sizes=[], steps=1))
    assert len(server.calls) == 2


def test_limit_ends_a_block_and_its_open_requests_count_with_their_age() -> None:
    server = answering(image)
    server.script = [after(0.0), after(30.0), after(30.0)]
    sample = measure(server, image_load(in_flight=2, sizes=[], steps=1), count=3, limit_s=0.3)
    assert sample.units == 1
    assert len(sample.latencies) == 3
    assert sample.percentile(95) >= 0.25
    assert server.running == 0


def test_block_without_an_answer_is_a_failure() -> None:
    server = FakeServer()
    server.hung = True
    with pytest.raises(TrialFailed, match="no answer within 0 s"):
        measure(server, image_load(in_flight=2, sizes=[], steps=1), limit_s=0.1)
    assert server.running == 0


def test_file_of_tasks_is_a_load_for_each_of_its_models(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    tasks = [
        {"id": "a", "prompt": "one", "steps": 2, "task_id": "mine"},
        {"query": "q", "documents": ["d", "e"]},
        {"prompt": "two"},
    ]
    path.write_text("".join(f"{json.dumps(task)}\n" for task in tasks))
    images = file_load(path, "flux", in_flight=2)
    rankings = file_load(path, "rerank", in_flight=2)
    assert images
    assert rankings
    assert images.block(0, 3) == [{"prompt": "one", "steps": 2}, {"prompt": "two"}, {"prompt": "one", "steps": 2}]
    assert rankings.block(0, 1) == [{"query": "q", "documents": ["d", "e"]}]
    path.write_text('{"prompt": "one"}\n')
    assert file_load(path, "rerank", in_flight=2) is None


@pytest.mark.parametrize(("text", "message"), [("{", "line 1 is not JSON"), (None, "cannot read")])
def test_unusable_file_of_tasks_is_an_error(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(FileProblem, match=message):
        file_load(path, "flux", in_flight=1)
