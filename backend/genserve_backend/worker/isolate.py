"""Isolation of failing items in a batch."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch

from genserve_backend.errors import OutOfMemory, RequestError
from genserve_backend.logs import log
from genserve_backend.worker.engine import defect

logger = logging.getLogger(__name__)

CUDA_ERROR_MEMORY_ALLOCATION = 2
"""cudaErrorMemoryAllocation of cudaError_t, the code that torch.AcceleratorError carries."""
ALLOCATION_FAILED = re.compile(r"CUDA error: out of memory|CU(BLAS|DNN)_STATUS_\w*ALLOC\w*FAILED")
"""A failed allocation in CUDA's libraries, which torch raises as a plain RuntimeError."""

Item = TypeVar("Item", bound=Hashable)
Result = TypeVar("Result")
Outcome = TypeVar("Outcome")


class DeviceLost(Exception):
    """The device accepts no further work in this process; only a new worker helps."""


def isolate(
    work: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item], *, name: Callable[[Item], str]
) -> tuple[dict[Item, Result], dict[Item, RequestError]]:
    """Run `work` on a batch; if it fails, on its halves, and so on down to the items that fail alone.

    Args:
        work: Returns one result per item, in order, and has no effect if it raises.
        items: The batch.
        name: Describes an item in its error.

    Returns:
        The results, and the errors of the items without one: OutOfMemory for an item that does not fit into the
        device's memory alone, ServerError for anything else.

    Raises:
        DeviceLost: The device has failed for good.
    """
    failure = attempt(work, items)
    if not isinstance(failure, Exception):
        return dict(zip(items, failure, strict=True)), {}
    # Outside the except clause, because an exception that is being handled keeps the tensors in its frames alive.
    out_of_memory = is_out_of_memory(failure)
    log(logger, logging.WARNING, "batch failed", items=len(items), error=type(failure).__name__)
    if out_of_memory and torch.cuda.is_available():
        torch.cuda.empty_cache()  # cached blocks have the wrong sizes for the halves
    if len(items) > 1:
        middle = (len(items) + 1) // 2
        done, failed = isolate(work, items[:middle], name=name)
        more_done, more_failed = isolate(work, items[middle:], name=name)
        return done | more_done, failed | more_failed
    if out_of_memory:
        return {}, {items[0]: OutOfMemory(f"{name(items[0])} does not fit into the device's memory, not even alone")}
    logger.error("item failed", exc_info=failure)
    return {}, {items[0]: defect(failure)}


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error of torch, CUDA or its libraries means that the device's memory is full."""
    if isinstance(error, torch.OutOfMemoryError) or getattr(error, "error_code", None) == CUDA_ERROR_MEMORY_ALLOCATION:
        return True
    return isinstance(error, RuntimeError) and ALLOCATION_FAILED.search(str(error)) is not None


def attempt(work: Callable[[Sequence[Item]], Outcome], items: Sequence[Item]) -> Outcome | Exception:
    """Return the result of `work`, or its exception, which keeps no tensors alive unless it is about a single item.

    Raises:
        DeviceLost: The device has failed for good.
    """
    try:
        return work(items)
    except DeviceLost:
        raise
    except torch.AcceleratorError as error:
        if not is_out_of_memory(error):
            raise DeviceLost(str(error)) from None
        return error.with_traceback(None)
    except Exception as error:
        # The traceback's frames keep the batch's tensors alive. Only an item that fails alone needs it, for the log.
        return error if len(items) == 1 and not is_out_of_memory(error) else error.with_traceback(None)
