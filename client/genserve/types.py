"""Results of the client's calls."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

from PIL import Image

Priority = Literal["high", "normal", "low"]
"""How urgent a request is."""
ImageFormat = Literal["png", "jpeg", "webp"]
"""How an image is encoded."""
TaskState = Literal["waiting", "running", "done", "failed", "cancelled", "unknown"]
"""How far a task has come; one in Triton's queue is unknown to the models, and so is one that ended long ago."""


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
        return _decoded(self.data)

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


@dataclass(frozen=True, eq=False)
class Ranking(Sequence[RankedDocument]):
    """Documents by falling relevance. Iterates, indexes and compares like a list of them.

    Attributes:
        documents: The best ones, at most ``top_n``.
        scores: The relevance of every document, in the order in which they were given.
        info: What the server tells: timings in seconds, the instance, tokens, and what was cut.
    """

    documents: tuple[RankedDocument, ...]
    scores: tuple[float, ...] = field(repr=False)
    info: dict[str, Any] = field(repr=False)

    @property
    def truncated(self) -> tuple[int, ...]:
        """Indices of the documents that were cut at the model's length limit."""
        return tuple(self.info.get("truncated", ()))

    @overload
    def __getitem__(self, index: int) -> RankedDocument: ...
    @overload
    def __getitem__(self, index: slice) -> list[RankedDocument]: ...
    def __getitem__(self, index: int | slice) -> RankedDocument | list[RankedDocument]:
        return list(self.documents[index]) if isinstance(index, slice) else self.documents[index]

    def __len__(self) -> int:
        return len(self.documents)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, (Ranking, list, tuple)):
            return list(self) == list(other)
        return NotImplemented

    def __hash__(self) -> int:
        return hash(self.documents)


@dataclass(frozen=True)
class TaskStatus:
    """A request that a server knows by its id.

    Attributes:
        task_id: The id.
        state: How far it has come.
        step: Steps that are done.
        steps: Steps in all; 0 before it runs.
        model: The model that it is for; empty where the state is unknown, as are the next fields.
        instance: The instance that has it.
        error: The reason for which it failed or was cancelled.
        arrived: Seconds since the epoch at which an instance took it.
        changed: Seconds since the epoch at which it last made progress.
        preview: A small JPEG of the image so far; empty where there is none.
    """

    task_id: str
    state: TaskState
    step: int = 0
    steps: int = 0
    model: str | None = None
    instance: str | None = None
    error: str | None = None
    arrived: float | None = None
    changed: float | None = None
    preview: bytes = field(default=b"", repr=False)

    @property
    def progress(self) -> float:
        """The part of the work that is done, 0 to 1."""
        if self.state == "done":
            return 1.0
        return min(1.0, self.step / self.steps) if self.steps else 0.0

    @property
    def is_in_flight(self) -> bool:
        """True while an instance has it and it has not ended."""
        return self.state in {"waiting", "running"}

    @cached_property
    def preview_image(self) -> Image.Image | None:
        """The decoded preview, None where there is none."""
        return _decoded(self.preview) if self.preview else None

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the preview, for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "preview"}


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
    """One server: whether it is reachable and ready, its models, and the tasks in flight.

    Attributes:
        error: The reason for which it is not live; empty where it is.
    """

    url: str
    live: bool
    ready: bool
    version: str
    models: tuple[ModelStatus, ...]
    tasks: tuple[TaskStatus, ...]
    error: str = ""


def _decoded(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image
