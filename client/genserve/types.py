"""What the client returns."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class GeneratedImage:
    """An image, and how it came about.

    Attributes:
        data: The encoded file, with the settings in its metadata.
        seed: The seed that was used; sending it again gives the same image.
        info: What the server tells: timings in seconds, the instance, and every setting.
    """

    data: bytes = field(repr=False)
    seed: int
    info: dict[str, Any]

    @cached_property
    def image(self) -> Image.Image:
        """The decoded image."""
        image = Image.open(io.BytesIO(self.data))
        image.load()
        return image

    def save(self, path: str | Path) -> None:
        """Write the encoded file as it came."""
        Path(path).write_bytes(self.data)


@dataclass(frozen=True)
class RankedDocument:
    """A document with its relevance.

    Attributes:
        index: Its place among the documents as they were given.
        score: Relevance, 0 to 1.
        document: Its text.
    """

    index: int
    score: float
    document: str


@dataclass(frozen=True)
class ModelStatus:
    """A model on one server.

    Attributes:
        state: Triton's word for it; READY is what one wants.
        succeeded: Requests answered since the server started.
        failed: Requests answered with an error since then.
        queue_s: Mean seconds in Triton's queue.
    """

    name: str
    version: str
    state: str
    reason: str
    succeeded: int
    failed: int
    queue_s: float


@dataclass(frozen=True)
class ServerStatus:
    """One server: whether it is reachable and ready, its models, and the tasks in flight."""

    url: str
    live: bool
    ready: bool
    version: str
    models: tuple[ModelStatus, ...]
    tasks: tuple[dict[str, Any], ...]
