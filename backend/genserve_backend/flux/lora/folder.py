"""The folder of adapters: names to files. Does not import torch."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

from genserve_backend.errors import shorten

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
"""File of an adapter that diffusers saved as a folder."""


class AdapterError(Exception):
    """An adapter that cannot be used; the message says why, and goes to the caller."""


class Version(NamedTuple):
    """Identity of a file's contents."""

    modified_ns: int
    size: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Version:
        """Return the version in a file's status."""
        return cls(status.st_mtime_ns, status.st_size, status.st_ino)


class AdapterFile(NamedTuple):
    """A file in the folder, as it was found."""

    name: str
    path: Path
    version: Version


def find(folder: Path, name: str) -> AdapterFile:
    """Return the file of an adapter: ``NAME.safetensors`` or ``NAME/pytorch_lora_weights.safetensors``.

    Args:
        folder: The folder of adapters.
        name: A name that `request.is_adapter_name` accepts.

    Raises:
        AdapterError: There is none, it is no regular file, or a link leads out of the folder.
    """
    try:
        root = folder.resolve(strict=True)
    except OSError as error:
        raise AdapterError(f"the server's folder of adapters cannot be read ({error.strerror})") from None
    for path in (root / f"{name}.safetensors", root / name / WEIGHTS_FILE):
        try:
            real = path.resolve(strict=True)
            status = real.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links, before Python 3.13
            raise AdapterError(f"its file cannot be read ({getattr(error, 'strerror', 'a circle of links')})") from None
        if real.is_relative_to(root) and stat.S_ISREG(status.st_mode):
            return AdapterFile(name, real, Version.of(status))
    raise AdapterError("the server has no adapter of this name")


def read_bytes(file: AdapterFile, *, max_bytes: int) -> bytes:
    """Return the contents of a file.

    They are read, not mapped: a mapped file that is truncated meanwhile would end the process.

    Raises:
        AdapterError: It is larger than `max_bytes`, cannot be read, or changes meanwhile.
    """
    if file.version.size > max_bytes:
        raise AdapterError(f"its file has {file.version.size:,} bytes; allowed: at most {max_bytes:,}")
    try:
        with file.path.open("rb") as source:
            data = source.read(file.version.size + 1)
            version = Version.of(os.fstat(source.fileno()))
    except OSError as error:
        raise AdapterError(f"its file cannot be read ({shorten(error.strerror or type(error).__name__)})") from None
    if version != file.version or len(data) != version.size:
        raise AdapterError("its file changed while it was read; try again")
    return data
