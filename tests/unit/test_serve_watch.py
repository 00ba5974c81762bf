"""Hang detection."""

from __future__ import annotations

import time

import pytest

from genserve.serve import watch as watch_module
from genserve.serve.watch import Watch


class FakeProcess:
    """Server process with a configurable state."""

    def __init__(self) -> None:
        self.dead: str | None = None
        self.stopped: list[str] = []
        self.probes = 0

    def dead_part(self) -> str | None:
        return self.dead

    def stopped_parts(self) -> list[str]:
        self.probes += 1
        return self.stopped


@pytest.fixture
def process() -> FakeProcess:
    return FakeProcess()


@pytest.fixture
def watch(process: FakeProcess, monkeypatch: pytest.MonkeyPatch) -> Watch:
    monkeypatch.setattr(watch_module, "PROBE_S", 0.0)
    return Watch(process, hang_timeout_s=0.2)


def test_dead_part_is_reported_at_once(process: FakeProcess, watch: Watch) -> None:
    assert watch.failure() is None
    process.dead = "stub 7 died"
    assert watch.failure() == "stub 7 died"


def test_stopped_part_is_reported_after_the_timeout(process: FakeProcess, watch: Watch) -> None:
    process.stopped = ["stub 7"]
    assert watch.failure() is None
    time.sleep(0.25)
    assert watch.failure() == "no sign of life from stub 7 for 0.2 s"


def test_resumed_part_resets_the_timeout(process: FakeProcess, watch: Watch) -> None:
    process.stopped = ["tritonserver"]
    assert watch.failure() is None
    time.sleep(0.25)
    process.stopped = []
    assert watch.failure() is None
    process.stopped = ["tritonserver"]
    assert watch.failure() is None


def test_time_without_probes_does_not_count(process: FakeProcess, watch: Watch) -> None:
    """`genserve serve` itself may have been stopped."""
    time.sleep(0.25)
    process.stopped = ["tritonserver"]
    assert watch.failure() is None


def test_probes_are_a_second_apart(process: FakeProcess) -> None:
    watch = Watch(process, hang_timeout_s=5.0)
    for _ in range(10):
        assert watch.failure() is None
    assert process.probes == 0
