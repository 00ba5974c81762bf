"""Results of the client's calls."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt
from PIL import Image

from genserve.image_files import file_bytes

if TYPE_CHECKING:
    import pandas as pd

Priority = Literal["high", "normal", "low"]
"""Priority of a request."""
ImageFormat = Literal["png", "jpeg", "webp"]
"""Encoding of an image."""
Adapter = str | tuple[str, float] | Mapping[str, Any]
"""LoRA adapter: a name, which has weight 1; a name with its weight; or ``{"name": str, "weight": float}``."""
Adapters = Adapter | Mapping[str, float] | Sequence[Adapter]
"""Adapters of one image: one, several, or weights by name."""
TaskState = Literal["waiting", "running", "done", "failed", "cancelled", "unknown"]
"""State of a task. ``unknown`` covers tasks in Triton's queue and tasks that ended long ago."""


@dataclass(frozen=True)
class GeneratedImage:
    """Generated image with its seed and settings. Notebooks show it, and ``np.asarray`` takes it.

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
        """Write the image to a file.

        Args:
            path: The file. Without a suffix, or with one that fits the encoding, its bytes are `data`. With another
                suffix, as ``.jpg`` or ``.webp``, the image is converted. The settings stay in the metadata of formats
                that have a place for them.

        Raises:
            InvalidInput: Pillow writes no files with this suffix.
            OSError: The file cannot be written.
        """
        path = Path(path)
        path.write_bytes(file_bytes(self.data, path.suffix))

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """Return the pixels as a new array, height x width x 3, uint8 unless another `dtype` is given."""
        if copy is False:
            raise ValueError("an image is decoded into a new array; allowed: copy=None or True")
        return np.array(self.image.convert("RGB"), dtype=dtype)

    def _repr_png_(self) -> bytes:
        """Return a PNG file for notebooks, whatever the encoding."""
        return file_bytes(self.data, ".png")


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

    def to_pandas(self) -> pd.DataFrame:
        """Return a table with the columns index, score and document, the best document first.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ModuleNotFoundError as error:
            raise ImportError("Ranking.to_pandas needs pandas: pip install 'genserve[pandas]'") from error
        # With their types, which an empty table would not have.
        return pd.DataFrame(
            {
                "index": pd.Series([each.index for each in self], dtype="int64"),
                "score": pd.Series([each.score for each in self], dtype="float64"),
                "document": pd.Series([each.document for each in self], dtype="str"),
            }
        )

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


@dataclass(frozen=True)
class InstanceLoad:
    """Load of one instance of a model.

    Attributes:
        instance: Triton's name of the instance, as ``flux_0_0``.
        model: The instance's model.
        device: ``cuda:N`` or ``cpu``.
        gpu_id: Triton's GPU id; None on a CPU.
        running: Tasks in progress.
        waiting: Tasks that wait at the instance; without those in Triton's queue.
        memory_used: Bytes that the worker holds: GPU memory, or its resident set on a CPU. None while it is unknown,
            like the next two.
        memory_free: Free bytes of the GPU, or available bytes of the machine.
        memory_total: All bytes of the GPU or of the machine.
        ready: False while the worker is started or replaced.
        url: The server's address.
    """

    instance: str
    model: str
    device: str
    gpu_id: int | None
    running: int
    waiting: int
    memory_used: int | None
    memory_free: int | None
    memory_total: int | None
    ready: bool
    url: str = ""


@dataclass(frozen=True)
class Setting:
    """Setting in force.

    Attributes:
        model: The model that has the setting.
        name: The parameter's name.
        value: The value: a string, a number, a boolean, a list or None.
        source: ``environment VARIABLE``, ``config.pbtxt``, ``MODEL_SIZE`` for a limit that it sets, or ``default``.
        url: The server's address.
    """

    model: str
    name: str
    value: Any
    source: str
    url: str = ""


def _decoded(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image
