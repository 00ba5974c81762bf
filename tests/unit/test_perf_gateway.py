"""The gateway's studies of cost and with aiperf: verdicts, and aiperf's commands."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from studies import gateway_aiperf, gateway_cost
from studies.gateway_cost import DIRECT, GATEWAY, IMAGE, RERANK, Compared


def compared(added_s: float, share: float) -> Compared:
    return Compared(
        seconds={DIRECT: [0.010, 0.011, 9.0], GATEWAY: [0.011 + added_s] * 3},
        blocks={DIRECT: [10.0, 10.0], GATEWAY: [10.0 * share] * 2},
    )


def test_cost_within_the_promise() -> None:
    found = {RERANK: compared(0.0029, 0.98), IMAGE: compared(-0.001, 1.1)}
    assert gateway_cost.broken_promises(found) == []
    assert found[RERANK].added_s == pytest.approx(0.0029)


def test_cost_beyond_the_promise() -> None:
    found = {RERANK: compared(0.0031, 0.98), IMAGE: compared(0.0, 0.96)}
    assert gateway_cost.broken_promises(found) == [
        "rerank: 3.10 ms more, promised at most 3 ms",
        "image: 0.960 of the throughput, promised 0.97",
    ]


def test_rate_is_that_of_all_blocks_together() -> None:
    assert Compared(blocks={DIRECT: [10.0, 30.0], GATEWAY: []}).rate(DIRECT) == pytest.approx(15.0)


def test_block_keeps_the_given_number_in_flight() -> None:
    most, running, sent = 0, 0, []

    async def send(number: int) -> None:
        nonlocal most, running
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        sent.append(number)

    asyncio.run(gateway_cost.run_block(send, range(20), 4))
    assert most == 4
    assert sorted(sent) == list(range(20))


def test_aiperf_errors_and_missing_answers_are_reported() -> None:
    reports = {
        "good": {"request_count": {"avg": 4.0}, "error_summary": []},
        "none": {"error_summary": []},
        "wrong": {"request_count": {"avg": 4.0}, "error_summary": [{"count": 1}]},
    }
    broken = gateway_aiperf.broken_promises(reports, 4)
    assert [line.partition(":")[0] for line in broken] == ["none", "wrong"]


def test_aiperf_is_called_for_every_kind_of_endpoint() -> None:
    kinds = {run.endpoint for run in gateway_aiperf.RUNS.values()}
    assert kinds == {"image_generation", "cohere_rankings", "hf_tei_rankings", "nim_rankings"}
    streaming = gateway_aiperf.RUNS["images, streaming"]
    command = streaming.command(Path("aiperf"), "http://gateway", Path("out"), requests=4, concurrency=2)
    assert command[:2] == ["aiperf", "profile"]
    assert command[-1] == "--streaming"
    assert command[command.index("--request-count") + 1] == "4"
