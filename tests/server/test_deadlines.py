"""Deadlines of callers, through a real server that plans with them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conftest import Server, serving, wait_until

from genserve import Client, DeadlineExceeded

TASK_TIMEOUT_S = 240.0
LONG = {"steps": 100, "height": 512, "width": 512}


@pytest.fixture(scope="module")
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from serving(tmp_path_factory, "--model", "flux", "--model", "tasks", FLUX_POLICY="slack")


@pytest.mark.parametrize("timeout_s", [60.0, 600.0], ids=["own-deadline", "limit-of-the-server"])
def test_info_tells_the_time_left(client: Client, timeout_s: float) -> None:
    info = client.generate("a red circle", steps=2, timeout=timeout_s).info
    assert 0 < info["deadline_left_s"] <= min(timeout_s, TASK_TIMEOUT_S) - info["elapsed_time"] + 0.001
    assert info["deadline_left_s"] > min(timeout_s, TASK_TIMEOUT_S) / 2


def test_request_that_cannot_be_finished_in_time_is_refused(client: Client, server: Server) -> None:
    before = server.metric("flux", "genserve_missed_deadlines_total", reason="refused")
    client.generate("a red circle", steps=30)  # the engine learns its times, and refuses by measured ones only
    client.generate("a red circle", **{**LONG, "steps": 4})
    with pytest.raises(DeadlineExceeded, match=r"takes about [\d.]+ s on an idle device, and only [\d.]+ s are left"):
        client.generate("a red circle", timeout=3.0, **LONG)
    wait_until(
        lambda: server.metric("flux", "genserve_missed_deadlines_total", reason="refused") == before + 1,
        what="the refusal to be counted",
    )
