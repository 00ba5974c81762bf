"""A FLUX engine in the test's own process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import features
import lora_files
import torch
from diffusers import FluxTransformer2DModel
from pictures import Pixels, levels
from turned_engine import TurnedEngine

from genserve.protocol import lora_adapters
from genserve_backend.errors import RequestError
from genserve_backend.flux.build import build
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.request import FluxRequest, FluxResult, parse
from genserve_backend.settings import FluxSettings

MAX_PIXELS = 2**20


class EngineRun(TurnedEngine):
    """A FLUX engine for a checkpoint, with the test run's features that `settings` leaves open."""

    def __init__(self, checkpoint: FluxCheckpoint, **settings: Any) -> None:
        self.checkpoint = checkpoint
        own = features.chosen.flux_settings()
        self._adds_adapters = "lora_path" in own and "lora_path" not in settings
        if self._adds_adapters:
            own["lora_path"] = write_adapters(checkpoint)
        self.settings = FluxSettings(model_path=checkpoint.path, **{**own, **settings})
        if self.settings.compiled:
            torch._dynamo.reset()  # the code of earlier engines would count towards torch's limit
        self._parsed = 0
        super().__init__(lambda emit: build(self.settings, "cpu", emit))
        if self._adds_adapters:  # loaded at once, since tests count turns
            adapters = self.engine._adapters
            adapters.load = lambda loras, done: done(adapters._loader._combine(loras))

    def parse(self, **values: Any) -> FluxRequest:
        self._parsed += 1
        added = features.chosen.arguments(values.get("SEED", self._parsed))
        if not self._adds_adapters:
            added.pop("lora", None)
        method = self.settings.cache_method
        if not self.checkpoint.has_mag_ratios and method == "magcache":
            added.pop("cache", None)
        if "lora" in added:
            added["lora"] = json.dumps(lora_adapters(added["lora"]))
        tensors = {name.upper(): value for name, value in added.items()}
        values = {"PROMPT": "a red circle", **tensors, **values}
        return parse(values, self.checkpoint, max_pixels=MAX_PIXELS, cache_method=method)

    def images(self, *requests: FluxRequest) -> list[Pixels]:
        """Submit all requests at once, and return their images; every one has to succeed."""
        return [pixels(result) for result in self.run(*requests)]


def write_adapters(checkpoint: FluxCheckpoint) -> Path:
    """Write random adapters with the features' names for a checkpoint, once; return their folder."""
    folder = checkpoint.path.parent / f"{checkpoint.path.name}-loras"
    if not folder.exists():
        folder.mkdir()
        shapes = lora_files.shapes(FluxTransformer2DModel.from_pretrained(checkpoint.path / "transformer"))
        for seed, name in enumerate(features.ADAPTERS):
            lora_files.write(folder, name, lora_files.diffusers_keys(shapes, 4, seed=seed))
    return folder


def pixels(result: FluxResult | RequestError) -> Pixels:
    """Return the pixels of an image that succeeded."""
    assert isinstance(result, FluxResult), result
    return levels(result.image)
