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
"""Priority of a request."""
ImageFormat = Literal["png", "jpeg", "webp"]
"""Encoding of an image."""
TaskState = Literal["waiting", "running", "done", "failed", "cancelled", "unknown"]
"""State of a task. ``unknown`` covers tasks in Triton's queue and tasks that ended long ago."""


@dataclass(frozen=True)
class GeneratedImage:
    """Generated image with its seed and settings.

    Attributes:
        data: The encoded file, with the settings in its metadata.
        seed: The seed used. The same seed gives the same image.
        info: The server's INFO: timings in seconds, the instance and every setting.
    """

    data: bytes = field(repr=False)
    seed: int
    info: dict[str, Any]

    @cached_property
    def image(self) -> Image.Image:
        """The decoded image."""
        return _decoded(self.data)

    def save(self, path: str | Path) -> None:
        """Write the encoded file."""
        Path(path).write_bytes(self.data)


@dataclass(frozen=True)
class RankedDocument:
    """Document with its relevance.

    Attributes:
        index: The document's index in the request.
        score: Relevance, 0 to 1.
        document: The text.
    """

    index: int
    score: float
    document: str


@dataclass(frozen=True, eq=False)
class Ranking(Sequence[RankedDocument]):
    """Documents by descending relevance. Behaves like a list of RankedDocument.

    Attributes:
        documents: The best documents, at most ``top_n``.
        scores: The relevance of every document, in request order.
        info: The server's INFO: timings in seconds, the instance, tokens and truncated documents.
    """

    documents: tuple[RankedDocument, ...]
    scores: tuple[float, ...] = field(repr=False)
    info: dict[str, Any] = field(repr=False)

    @property
    def truncated(self) -> tuple[int, ...]:
        """Indices of the documents truncated at the model's length limit."""
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
    """State and progress of a task.

    Attributes:
        task_id: The task's id.
        state: One of `TaskState`.
        step: Finished steps.
        steps: Total steps; 0 before the task runs.
        model: The task's model. None in state ``unknown``, like the following fields.
        instance: The instance that holds the task.
        error: The reason of a failure or cancellation, else None.
        arrived: Arrival at the instance, in seconds since the epoch.
        changed: Last progress, in seconds since the epoch.
        preview: A small JPEG of the unfinished image; empty if there is none.
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
        """Finished fraction, 0 to 1."""
        if self.state == "done":
            return 1.0
        return min(1.0, self.step / self.steps) if self.steps else 0.0

    @property
    def is_in_flight(self) -> bool:
        """True while an instance holds the task and it has not ended."""
        return self.state in {"waiting", "running"}

    @cached_property
    def preview_image(self) -> Image.Image | None:
        """The decoded preview, None without one."""
        return _decoded(self.preview) if self.preview else None

    def as_dict(self) -> dict[str, Any]:
        """Return every field except the preview, for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "preview"}


@dataclass(frozen=True)
class ModelStatus:
    """Model on one server.

    Attributes:
        name: The model's name.
        version: Triton's version of the model, usually ``1``.
        state: Triton's state, as ``READY`` or ``UNAVAILABLE``.
        reason: Triton's reason for a state other than ``READY``.
        succeeded: Requests answered since the server started.
        failed: Requests failed since the server started.
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
    """State of one server.

    Attributes:
        url: The server's address.
        live: The server answers.
        ready: Every model is ready.
        version: Triton's version.
        models: The server's models.
        tasks: The tasks in flight.
        error: The reason why the server is not live, else empty.
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
