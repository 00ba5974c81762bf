"""When a server counts as hanging."""

from __future__ import annotations

import time

import pytest

from genserve.serve import watch as watch_module
from genserve.serve.watch import Watch


class FakeProcess:
    """A server that says what a test wants."""

    def __init__(self) -> None:
        self.dead: str | None = None
        self.stopped: list[str] = []
        self.probes = 0

    def what_died(self) -> str | None:
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


def test_a_dead_part_is_named_at_once(process: FakeProcess, watch: Watch) -> None:
    assert watch.cause() is None
    process.dead = "stub 7 died"
    assert watch.cause() == "stub 7 died"


def test_a_stopped_part_is_named_after_the_timeout(process: FakeProcess, watch: Watch) -> None:
    process.stopped = ["stub 7"]
    assert watch.cause() is None
    time.sleep(0.25)
    assert watch.cause() == "no sign of life from stub 7 for 0.2 s"


def test_a_part_that_moves_again_is_forgiven(process: FakeProcess, watch: Watch) -> None:
    process.stopped = ["tritonserver"]
    assert watch.cause() is None
    time.sleep(0.25)
    process.stopped = []
    assert watch.cause() is None
    process.stopped = ["tritonserver"]
    assert watch.cause() is None


def test_time_in_which_nobody_looked_does_not_count(process: FakeProcess, watch: Watch) -> None:
    """As after `genserve serve` has been stopped itself."""
    time.sleep(0.25)
    process.stopped = ["tritonserver"]
    assert watch.cause() is None


def test_probes_are_a_second_apart(process: FakeProcess) -> None:
    watch = Watch(process, hang_timeout_s=5.0)
    for _ in range(10):
        assert watch.cause() is None
    assert process.probes == 0
