"""A FLUX engine in the test's own process."""

from __future__ import annotations

from typing import Any

from pictures import Pixels, levels
from turned_engine import TurnedEngine

from genserve_backend.errors import RequestError
from genserve_backend.flux.build import build
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.request import FluxRequest, FluxResult, parse
from genserve_backend.settings import FluxSettings

MAX_PIXELS = 2**20


class EngineRun(TurnedEngine):
    """A FLUX engine for a checkpoint."""

    def __init__(self, checkpoint: FluxCheckpoint, **settings: Any) -> None:
        self.checkpoint = checkpoint
        super().__init__(lambda emit: build(FluxSettings(model_path=checkpoint.path, **settings), "cpu", emit))

    def parse(self, **values: Any) -> FluxRequest:
        return parse({"PROMPT": "a red circle", **values}, self.checkpoint, max_pixels=MAX_PIXELS)

    def images(self, *requests: FluxRequest) -> list[Pixels]:
        """Submit all requests at once, and return their images; every one has to succeed."""
        return [pixels(result) for result in self.run(*requests)]


def pixels(result: FluxResult | RequestError) -> Pixels:
    """Return the pixels of an image that succeeded."""
    assert isinstance(result, FluxResult), result
    return levels(result.image)
