"""Isolation of failing items in a batch: results and errors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch

from genserve_backend.errors import OutOfMemory, RequestError, ServerError
from genserve_backend.worker.isolate import DeviceLost, isolate

ITEMS = tuple("abcdefgh")


class Work:
    """Work that doubles letters. Items in `bad` raise, and batches larger than `room` are out of memory."""

    def __init__(self, bad: Mapping[str, Exception] | None = None, *, room: int = 100) -> None:
        self.room = room
        self.bad = bad or {}
        self.batches: list[str] = []

    def __call__(self, items: Sequence[str]) -> list[str]:
        self.batches.append("".join(items))
        if len(items) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        for item in items:
            if item in self.bad:
                raise self.bad[item]
        return [item * 2 for item in items]


def do(
    work: Callable[[Sequence[str]], Sequence[str]], items: Sequence[str] = ITEMS
) -> tuple[str, dict[str, RequestError]]:
    """Return the items with a result, and the errors of the others."""
    done, failed = isolate(work, items, name=lambda item: f"item {item}")
    assert done.keys().isdisjoint(failed)
    assert done.keys() | failed.keys() == set(items)
    assert all(result == item * 2 for item, result in done.items())
    return "".join(sorted(done)), failed


def accelerator_error(message: str, code: int) -> torch.AcceleratorError:
    error = torch.AcceleratorError(message)
    error.error_code = code
    return error


OUT_OF_MEMORY = {
    "torch": torch.OutOfMemoryError("CUDA out of memory"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cudnn-9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "cuda": accelerator_error("CUDA error: out of memory", 2),
}


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_every_out_of_memory_error_becomes_out_of_memory(error: str) -> None:
    done, failed = do(Work({"c": OUT_OF_MEMORY[error]}))
    assert done == "abdefgh"
    (failure,) = failed.values()
    assert type(failure) is OutOfMemory


@pytest.mark.parametrize(
    "error",
    [
        accelerator_error("CUDA error: an illegal memory access was encountered", 700),
        torch.AcceleratorError("CUDA error: unspecified launch failure"),
    ],
    ids=["illegal-access", "launch-failure"],
)
def test_fatal_device_error_raises_device_lost(error: torch.AcceleratorError) -> None:
    with pytest.raises(DeviceLost):
        do(Work({"c": error}))


def test_batch_without_failures_runs_once() -> None:
    work = Work()
    assert do(work) == ("abcdefgh", {})
    assert work.batches == ["abcdefgh"]


@pytest.mark.parametrize("bad", ITEMS)
def test_failing_item_fails_alone(bad: str) -> None:
    done, failed = do(Work({bad: ValueError("secret")}))
    assert done == "abcdefgh".replace(bad, "")
    (error,) = failed.values()
    assert type(error) is ServerError
    assert "ValueError" in str(error)
    assert "secret" not in str(error)


@pytest.mark.parametrize("size", range(1, 9))
def test_all_items_may_fail(size: int) -> None:
    bad = {item: ValueError("no") for item in ITEMS[:size]}
    done, failed = do(Work(bad), ITEMS[:size])
    assert done == ""
    assert set(failed) == set(bad)


def test_each_failing_item_gets_its_own_error() -> None:
    done, failed = do(Work({"b": ValueError("no"), "c": KeyError("no"), "h": torch.OutOfMemoryError("no")}))
    assert done == "adefg"
    assert {item: type(error) for item, error in failed.items()} == {
        "b": ServerError,
        "c": ServerError,
        "h": OutOfMemory,
    }
    assert "ValueError" in str(failed["b"])
    assert "KeyError" in str(failed["c"])


def test_unexpected_error_is_logged_with_traceback(caplog: pytest.LogCaptureFixture) -> None:
    error = ValueError("for the operator")
    do(Work({"c": error}))
    (record,) = (record for record in caplog.records if record.exc_info)
    assert record.exc_info is not None
    assert record.exc_info[1] is error


@pytest.mark.parametrize("room", range(1, 9))
def test_batch_is_halved_until_it_fits(room: int) -> None:
    work = Work(room=room)
    assert do(work) == ("abcdefgh", {})
    fitting = [batch for batch in work.batches if len(batch) <= room]
    assert "".join(fitting) == "abcdefgh"
    assert min(map(len, fitting)) > room / 2 - 1


def test_item_that_does_not_fit_alone_is_named() -> None:
    done, failed = do(Work({"e": torch.OutOfMemoryError("CUDA out of memory")}, room=3))
    assert done == "abcdfgh"
    (error,) = failed.values()
    assert type(error) is OutOfMemory
    assert "item e" in str(error)
    assert "CUDA" not in str(error)


def test_failed_batch_is_freed_before_its_halves_run() -> None:
    activations: list[weakref.ref[torch.Tensor]] = []

    def work(items: Sequence[str]) -> list[str]:
        assert all(made() is None for made in activations)
        activation = torch.zeros(8)
        activations.append(weakref.ref(activation))
        if len(items) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [item * 2 for item in items]

    assert do(work) == ("abcdefgh", {})


@pytest.mark.parametrize("lost", [torch.AcceleratorError, DeviceLost])
@pytest.mark.parametrize("bad", ["a", "h"])
def test_lost_device_stops_the_work_at_once(bad: str, lost: type[Exception]) -> None:
    work = Work({bad: lost("CUDA error: an illegal memory access was encountered")})
    with pytest.raises(DeviceLost, match="illegal memory access"):
        isolate(work, ITEMS, name=str)
    assert work.batches == ["abcdefgh"]


def test_device_lost_midway_stops_the_work() -> None:
    work = Work({"c": torch.AcceleratorError("CUDA error: unspecified launch failure")}, room=2)
    with pytest.raises(DeviceLost, match="unspecified launch failure"):
        isolate(work, ITEMS, name=str)
    assert work.batches == ["abcdefgh", "abcd", "ab", "cd"]


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), SystemExit()], ids=lambda error: type(error).__name__)
def test_exit_exceptions_are_not_caught(raised: BaseException) -> None:
    def work(items: Sequence[str]) -> list[str]:
        raise raised

    with pytest.raises(type(raised)):
        isolate(work, ITEMS, name=str)
