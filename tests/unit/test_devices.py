"""Device helpers; GPU branches run with a mock of torch.cuda."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from genserve_backend import devices
from genserve_backend.board import Memory
from genserve_backend.devices import (
    Stopwatch,
    copy_arrays,
    copy_back,
    copy_together,
    hand_over,
    memory,
    move,
    own_stream,
    record_event,
    resolve_dtype,
    use_reproducible_kernels,
    wait_for_stream,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class MockCuda:
    """Records the calls to torch.cuda, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] = []
        calls = self.calls

        class Event:
            def __init__(self, *, blocking: bool = False, enable_timing: bool = False) -> None:
                calls.append(("event", blocking))
                self.is_done = False

            def query(self) -> bool:
                return self.is_done

            def elapsed_time(self, end: Event) -> float:
                return 250.0

            def record(self) -> None:
                calls.append("record")

            def synchronize(self) -> None:
                calls.append("sleep")

        class Stream:
            def __init__(self, device: torch.device) -> None:
                calls.append(("stream", device))

            def wait_event(self, event: Event) -> None:
                calls.append("wait")

        class Current:
            def __init__(self, stream: Stream) -> None:
                pass

            def __enter__(self) -> None:
                calls.append("enter")

            def __exit__(self, *_: object) -> None:
                calls.append("leave")

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", Current)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream(CUDA))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 40))


class HostTensor:
    """A host tensor that can be copied to a missing GPU."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def pin_memory(self) -> HostTensor:
        self.calls.append("pin")
        return self

    def to(self, device: torch.device, *, non_blocking: bool = False) -> HostTensor:
        self.calls.append((device, non_blocking))
        return self

    def record_stream(self, stream: object) -> None:
        self.calls.append("kept")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> MockCuda:
    return MockCuda(monkeypatch)


def test_stopwatch_reads_what_has_ended() -> None:
    stopwatch: Stopwatch[str] = Stopwatch(CPU)
    with stopwatch.measure("work"):
        pass
    with stopwatch.measure("other") as lap:
        lap.discard()
    with pytest.raises(ValueError, match="broken"), stopwatch.measure("broken"):
        raise ValueError("broken")
    ((what, seconds),) = stopwatch.read()
    assert what == "work"
    assert seconds > 0
    assert list(stopwatch.read()) == []


def test_stopwatch_does_not_wait_for_a_gpu(cuda: MockCuda) -> None:
    stopwatch: Stopwatch[str] = Stopwatch(CUDA)
    laps = []
    for what in ("a", "b"):
        with stopwatch.measure(what) as lap:
            laps.append(lap)
    assert list(stopwatch.read()) == []
    ends: list[Any] = [lap.events[1] for lap in laps if lap.events]
    ends[1].is_done = True
    assert list(stopwatch.read()) == []
    ends[0].is_done = True
    assert list(stopwatch.read()) == [("a", 0.25), ("b", 0.25)]
    assert "sleep" not in cuda.calls


def test_move_to_a_gpu_is_pinned_and_non_blocking() -> None:
    calls: list[Any] = []
    tensor: Any = HostTensor(calls)
    move(tensor, CUDA)
    assert calls == ["pin", (CUDA, True)]
    calls.clear()
    move(tensor, CPU)
    assert calls == [(CPU, False)]


def test_copy_together_makes_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.Tensor] = []

    def count(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        moved.append(tensor)
        return tensor

    monkeypatch.setattr(devices, "move", count)
    first, second, third = copy_together([[1, 2], [], [3]], CPU)
    assert (first.tolist(), second.tolist(), third.tolist()) == ([1, 2], [], [3])
    assert first.dtype == torch.int64
    assert len(moved) == 1


def test_copied_arrays_make_one_transfer_and_start_at_multiples_of_16_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.Tensor] = []

    def count(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        moved.append(tensor)
        return tensor

    monkeypatch.setattr(devices, "move", count)
    arrays = [np.array(each, dtype=np.int32) for each in ([1, 2, 3, 4, 5], [], [6], [7, 8])]
    copied = copy_arrays(arrays, CPU)
    assert [each.tolist() for each in copied] == [[1, 2, 3, 4, 5], [], [6], [7, 8]]
    assert {each.dtype for each in copied} == {torch.int32}
    assert [each.storage_offset() % 4 for each in copied] == [0] * 4
    assert len(moved) == 1


def test_copy_back_waits_only_for_its_event(cuda: MockCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.tensor([[0.5]])
    copied, event = copy_back(tensor)
    assert (copied is tensor, event, cuda.calls) == (True, None, [])

    class Pinned:
        def copy_(self, source: Any, *, non_blocking: bool) -> None:
            cuda.calls.append(("copy", non_blocking))

    def empty(*_: Any, pin_memory: bool, **__: Any) -> Pinned:
        cuda.calls.append(("pinned", pin_memory))
        return Pinned()

    monkeypatch.setattr(torch, "empty", empty)
    on_device: Any = type("OnGpu", (), {"device": CUDA, "shape": (1, 1), "dtype": torch.float32})()
    copied, event = copy_back(on_device)
    assert isinstance(copied, Pinned)
    assert event is not None
    assert cuda.calls == [("pinned", True), ("copy", True), ("event", True), "record"]


def test_recorded_event_lets_a_waiting_thread_sleep(cuda: MockCuda) -> None:
    assert record_event(CPU) is None
    assert cuda.calls == []
    assert record_event(CUDA) is not None
    assert cuda.calls == [("event", True), "record"]


def test_wait_for_stream_sleeps_until_the_stream_is_done(cuda: MockCuda) -> None:
    wait_for_stream(CPU)
    assert cuda.calls == []
    wait_for_stream(CUDA)
    assert cuda.calls == [("event", True), "record", "sleep"]


def test_hand_over_between_streams(cuda: MockCuda) -> None:
    tensor: Any = HostTensor(cuda.calls)
    hand_over(tensor, None)
    assert cuda.calls == []
    event = record_event(CUDA)
    cuda.calls.clear()
    hand_over(tensor, event)
    assert cuda.calls == [("stream", CUDA), "wait", "kept"]


def test_own_stream_is_a_new_stream(cuda: MockCuda) -> None:
    with own_stream(CPU):
        assert cuda.calls == []
    with own_stream(CUDA):
        assert cuda.calls == [("stream", CUDA), "enter"]
    assert cuda.calls[-1] == "leave"


def test_memory_of_a_gpu_is_reserved_free_and_total(cuda: MockCuda) -> None:
    assert memory(CUDA) == Memory(used=7, free=30, total=40)


def test_memory_of_a_cpu_is_resident_available_and_total() -> None:
    used, free, total = memory(CPU)
    assert used is not None
    assert free is not None
    assert total == pytest.approx(psutil.virtual_memory().total, rel=0.01)
    assert used == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)
    assert 10 * 2**20 < used < total
    assert 0 < free < total


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        ("auto", "cuda:0", torch.bfloat16),
        ("auto", "cpu", torch.float32),
        ("float16", "cuda:0", torch.float16),
        ("int8", "cpu", torch.float32),
    ],
    ids=str,
)
def test_resolve_dtype(dtype: Any, device: str, expected: torch.dtype) -> None:
    assert resolve_dtype(dtype, device) == expected


def test_kernels_are_fixed_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *given, **named: calls.append((given, named)))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True, raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    use_reproducible_kernels("cpu")
    assert calls == []
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    use_reproducible_kernels("cuda")
    assert calls == [((True,), {"warn_only": True})]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
