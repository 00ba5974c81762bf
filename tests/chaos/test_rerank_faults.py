"""A crash of the rerank worker with many requests in flight: all get their right ranking."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

from conftest import Server, wait_until
from rerank_requests import draw_request, same_ranking

from genserve import Client

IN_FLIGHT = 50
SENT = 64
"""Slack: the first responses may come before the last requests are sent."""


def test_killed_worker_with_fifty_in_flight_loses_no_ranking(server: Server) -> None:
    rng = random.Random(8)
    requests = [draw_request(rng, documents=20, words=150) for _ in range(SENT)]
    with Client(server.grpc, timeout=120) as client, ThreadPoolExecutor(SENT) as pool:
        expected = [client.rerank(*request) for request in requests]
        futures = [pool.submit(client.rerank, *request) for request in requests]
        wait_until(
            lambda: sum(task.model == "rerank" for task in client.status()[0].tasks) >= IN_FLIGHT,
            what="the requests to be in the instance",
        )
        worker = server.worker("rerank")
        worker.kill()
        answers = [future.result(60) for future in futures]
    assert all(same_ranking(*pair) for pair in zip(expected, answers, strict=True))
    assert server.worker("rerank").pid != worker.pid
    assert not worker.is_running()
