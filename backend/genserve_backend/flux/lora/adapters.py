"""The adapters of an engine: from the names of a request to the rows of a forward."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import FluxPipeline

from genserve_backend.errors import InvalidInput, RequestError
from genserve_backend.flux.lora.cache import AdapterCache, Combination
from genserve_backend.flux.lora.key_formats import TEXT_ENCODER, TRANSFORMER
from genserve_backend.flux.lora.layers import AdaptedModel
from genserve_backend.flux.lora.loader import AdapterLoader, Done, Limits
from genserve_backend.flux.lora.request import Lora
from genserve_backend.settings import FluxSettings
from genserve_backend.worker.isolate import isolate


class Adapters:
    """Adapters of a pipeline's transformer and CLIP text encoder.

    Args:
        pipeline: The pipeline on its device, in its final form; None serves no adapters.
        settings: The folder and the limits. Without a folder, the pipeline stays as it is.
    """

    def __init__(self, pipeline: FluxPipeline | None, settings: FluxSettings) -> None:
        self._models: dict[str, AdaptedModel] = {}
        self._cache = AdapterCache(settings.lora_cache_bytes)
        self._loader: AdapterLoader | None = None
        self._counted_loads = 0
        if pipeline is None or settings.lora_path is None:
            return
        device, dtype = pipeline.transformer.device, pipeline.transformer.dtype
        for part, model in ((TRANSFORMER, pipeline.transformer), (TEXT_ENCODER, pipeline.text_encoder)):
            self._models[part] = AdaptedModel(
                model, part, device=device, dtype=dtype, takes_turns=settings.deterministic
            )
        self._loader = AdapterLoader(
            settings.lora_path,
            self._cache,
            {part: model.shapes for part, model in self._models.items()},
            limits=Limits(settings.lora_max_bytes, settings.lora_max_rank),
            device=device,
            dtype=dtype,
        )

    @property
    def served(self) -> bool:
        """True if requests can have adapters."""
        return self._loader is not None

    def load(self, loras: Sequence[Lora], done: Done) -> None:
        """Load the adapters of a request into host memory.

        Args:
            loras: At least one.
            done: Called from another thread, or at once, with the combination or an error.
        """
        if self._loader is None:
            done(InvalidInput.of("LORA", f"a list with {loras[0].name}", "[] (the server has no folder of adapters)"))
        else:
            self._loader.put(loras, done)

    def place(self, combination: Combination) -> RequestError | None:
        """Copy adapters to the device, and drop others to keep the budget; return the error if that fails."""
        _, failed = isolate(_place, [combination], name=_name)
        if failed:
            for part in combination.parts:
                if not part.adapter.on_device:
                    self._cache.discard(part.adapter)
        self._cache.trim()
        return failed.get(combination)

    def select(self, combinations: Sequence[Combination | None]) -> None:
        """Give the batch rows of the transformer's next forward their adapters: one entry per row, None for none."""
        if model := self._models.get(TRANSFORMER):
            model.select(combinations)

    def select_texts(self, combinations: Sequence[Combination | None]) -> None:
        """Give the texts of CLIP's next forward their adapters: one entry per text, None for none."""
        if model := self._models.get(TEXT_ENCODER):
            model.select(combinations)

    def trim(self) -> None:
        """Free what no image in flight uses, beyond the budget."""
        self._cache.trim()
        for model in self._models.values():
            model.trim()

    def release(self) -> None:
        """Free all memory beyond the adapters themselves; the next forward allocates what it needs."""
        for model in self._models.values():
            model.clear()

    # For the metrics.

    @property
    def count(self) -> int:
        """Adapters on the device."""
        return len(self._cache.on_device())

    @property
    def nbytes(self) -> int:
        """Device memory of the adapters, and of the stacks that the forwards read."""
        adapters = sum(adapter.nbytes for adapter in self._cache.on_device())
        return adapters + sum(model.nbytes for model in self._models.values())

    def pop_loads(self) -> int:
        """Return the number of files that were loaded since the last call."""
        loads = self._loader.loads if self._loader else 0
        new, self._counted_loads = loads - self._counted_loads, loads
        return new

    def pop_evictions(self) -> int:
        """Return the number of adapters that were dropped since the last call."""
        return self._cache.pop_evictions()

    def busy_s(self) -> float:
        """Return the seconds that loading has spent on its current request."""
        return self._loader.busy_s() if self._loader else 0.0


def _place(combinations: Sequence[Combination]) -> list[None]:
    for combination in combinations:
        for part in combination.parts:
            part.adapter.place()
    return [None] * len(combinations)


def _name(combination: Combination) -> str:
    return " and ".join(f"the adapter {part.adapter.name}" for part in combination.parts)
