"""A thread that finds and reads adapter files, alongside the engine's: no step waits for them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from cachetools import LRUCache

from genserve_backend.devices import limit_threads, own_stream
from genserve_backend.errors import InvalidInput, RequestError
from genserve_backend.flux.lora.cache import Adapter, AdapterCache, Combination, Part
from genserve_backend.flux.lora.folder import AdapterError, AdapterFile, find, read_bytes
from genserve_backend.flux.lora.request import Lora
from genserve_backend.flux.lora.weights import Shape, read_weights
from genserve_backend.logs import log
from genserve_backend.worker.engine import defect
from genserve_backend.worker.threads import Busy, start_thread

ERRORS_KEPT = 1_000
"""Files whose error is remembered, so that naming them again costs nothing."""

Done = Callable[[Combination | RequestError], None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Limits on an adapter's file."""

    max_bytes: int
    max_rank: int


class AdapterLoader:
    """The thread.

    Args:
        folder: The folder of adapters.
        cache: Holds the adapters.
        shapes: Shapes of the layers that can be adapted, by part of the pipeline.
        limits: Limits on a file.
        device: The model's device.
        dtype: The model's dtype.
    """

    def __init__(
        self,
        folder: Path,
        cache: AdapterCache,
        shapes: Mapping[str, Mapping[str, Shape]],
        *,
        limits: Limits,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._folder = folder
        self._cache = cache
        self._shapes = shapes
        self._limits = limits
        self._device = device
        self._dtype = dtype
        self._errors: LRUCache[AdapterFile, str] = LRUCache(ERRORS_KEPT)
        self._queue: SimpleQueue[tuple[Sequence[Lora], Done]] = SimpleQueue()
        self._loads = 0
        self._busy = Busy()
        start_thread(self._run, name="adapters")

    def put(self, loras: Sequence[Lora], done: Done) -> None:
        """Load adapters; the thread calls `done` with their combination, or with the error of the first bad one."""
        self._queue.put((loras, done))

    @property
    def loads(self) -> int:
        """Files that were loaded so far."""
        return self._loads

    def busy_s(self) -> float:
        """Return the time that the thread has spent on its current request; 0 if it is idle."""
        return self._busy.seconds

    def _run(self) -> None:
        limit_threads()
        with torch.inference_mode(), own_stream(self._device):  # for the device: memory is pinned for the current one
            while True:
                loras, done = self._queue.get()
                with self._busy:
                    done(self._combine(loras))

    def _combine(self, loras: Sequence[Lora]) -> Combination | RequestError:
        parts = []
        for lora in loras:
            try:
                parts.append(Part(self._adapter(lora.name), lora.weight))
            except AdapterError as error:
                return InvalidInput(f"LORA names {lora.name}, but {error}")
            except Exception as error:
                logger.exception("adapter not loaded", extra={"fields": {"adapter": lora.name}})
                return defect(error)
        return self._cache.combine(parts)

    def _adapter(self, name: str) -> Adapter:
        file = find(self._folder, name)
        if adapter := self._cache.get(file):
            return adapter
        if file in self._errors:
            raise AdapterError(self._errors[file])
        started = time.monotonic()
        data = read_bytes(file, max_bytes=self._limits.max_bytes)
        try:
            weights = read_weights(data, self._shapes, max_rank=self._limits.max_rank, dtype=self._dtype)
        except AdapterError as error:
            self._errors[file] = str(error)
            log(logger, logging.WARNING, "adapter rejected", adapter=name, reason=error)
            raise
        adapter = Adapter(file, weights, self._device)
        self._cache.put(adapter)
        self._loads += 1
        seconds = round(time.monotonic() - started, 3)
        log(logger, logging.INFO, "adapter loaded", adapter=name, bytes=adapter.nbytes, seconds=seconds)
        return adapter
