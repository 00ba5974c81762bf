"""Weights of a checkpoint, from the headers of its safetensors files and their indexes. No weights are loaded."""

from __future__ import annotations

import math
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from safetensors import SafetensorError, safe_open

from genserve_backend.checkpoints import CheckpointError, read_json
from genserve_backend.errors import shorten
from genserve_backend.settings import WeightsDType

WEIGHTS_BYTES: dict[WeightsDType, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a value, by the dtype that weights are loaded in."""
KEPT_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
"""Bytes of a value, by the safetensors dtypes that are loaded as they are. All others are converted."""
POINTER = b"version https://git-lfs"
"""First bytes of the file that Git leaves in place of one that Git LFS has not fetched."""


class DamagedFile(Exception):
    """A file of a checkpoint that is missing, unreadable or damaged; the message is one line and names it."""


@dataclass(frozen=True)
class Tensor:
    """A tensor in a safetensors header.

    Attributes:
        dtype: safetensors' name of its dtype, as ``BF16``.
        values: Number of values.
        name: Its name.
    """

    dtype: str
    values: int
    name: str = ""

    def loaded_bytes(self, dtype: WeightsDType) -> int:
        """Return its bytes once it is loaded with weights in `dtype`."""
        return self.values * KEPT_BYTES.get(self.dtype, WEIGHTS_BYTES[dtype])


@dataclass
class Weights:
    """Tensors of a checkpoint, with the problems of its weight files.

    Attributes:
        tensors: The tensors that can be read.
        files: Number of safetensors files that were read.
        problems: One line per missing or damaged file.
    """

    tensors: list[Tensor] = field(default_factory=list)
    files: int = 0
    problems: list[str] = field(default_factory=list)

    def loaded_bytes(self, dtype: WeightsDType) -> int:
        """Return the bytes of all tensors once they are loaded in `dtype`."""
        return sum(tensor.loaded_bytes(dtype) for tensor in self.tensors)

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Add the tensors of one more file."""
        self.tensors += tensors
        self.files += 1


def read_weights(folder: Path, stem: str, *, index_first: bool) -> Weights:
    """Read the headers of the weight files of one model.

    Args:
        folder: The model's folder.
        stem: Name of the file without its suffix: ``model``, or ``diffusion_pytorch_model``.
        index_first: Whether the loader prefers an index with several files to a single file, if the folder has both.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    weights = Weights()
    if exists(index) and (index_first or not exists(single)):
        _read_shards(index, weights)
        return weights
    try:
        weights.add(read_header(single).values())
    except DamagedFile as error:
        weights.problems.append(str(error))
    return weights


def read_header(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name, from its header.

    safetensors checks that dtypes, shapes and offsets fit together, and that they cover the whole file.

    Raises:
        DamagedFile: The file is missing, unreadable, or no complete safetensors file.
    """
    require_file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            return {name: Tensor(part.get_dtype(), math.prod(part.get_shape()), name) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedFile(f"{path} {_reason(path, error)}") from None


def _reason(path: Path, error: Exception) -> str:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(POINTER))
    except OSError as unreadable:
        return f"cannot be read: {unreadable.strerror}"
    if start == POINTER:
        return "is a Git LFS pointer in place of the file: git lfs pull fetches it"
    said = str(error).rpartition("Error while deserializing header: ")[2]
    if "file not fully covered" in said:
        said = "its length does not match its header, as after an interrupted download"
    return f"is damaged ({size:,} bytes): {shorten(said, 200)}"


def _read_shards(index: Path, weights: Weights) -> None:
    """Read all files that an index names, and check that they have the tensors that it expects there."""
    try:
        named = _by_file(index)
    except DamagedFile as error:
        weights.problems.append(str(error))
        return
    for name, expected in named.items():
        try:
            tensors = read_header(index.parent / name)
        except DamagedFile as error:
            weights.problems.append(str(error))
            continue
        weights.add(tensors.values())
        missing = sorted(expected - tensors.keys())
        if missing:
            count = f"{len(missing):,} of {len(expected):,} tensors of {index.name}"
            weights.problems.append(f"{index.parent / name} lacks {count}, {shorten(missing[0])} for one")


def _by_file(index: Path) -> Mapping[str, set[str]]:
    """Return the names of the tensors in an index by the name of their file."""
    require_file(index)
    try:
        entries = read_json(index).get("weight_map")
    except CheckpointError as error:
        raise DamagedFile(str(error)) from None
    if not isinstance(entries, dict) or not entries:
        raise DamagedFile(f"{index} names no weights: it has no weight_map")
    named: dict[str, set[str]] = {}
    for tensor, file in entries.items():
        if not isinstance(file, str) or not file or PurePath(file).name != file:
            raise DamagedFile(f"{index} names {shorten(file)} as a file of weights")
        named.setdefault(file, set()).add(tensor)
    return dict(sorted(named.items()))


def require_file(path: Path) -> None:
    """Raise DamagedFile unless `path` is a file, or a link to one."""
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        raise DamagedFile(f"{path} is {'a broken link' if path.is_symlink() else 'missing'}") from None
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:  # a name from a damaged file that no path can have
        raise DamagedFile(f"{shorten(str(path))} is no path") from None
    if not is_file:
        raise DamagedFile(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}")


def exists(path: Path) -> bool:
    """Return whether the path exists. A broken link and a path that cannot be followed count: the loader meets them."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    return True
