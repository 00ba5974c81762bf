"""Output folders that appear complete or not at all."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def staged(output: Path, *, marker: str) -> Iterator[Path]:
    """Yield an empty folder that replaces `output` when the block ends without an error.

    Raises:
        FileExistsError: `output` is not empty and not an earlier result, which has the file `marker`.
    """
    if output.exists() and not (output / marker).is_file() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"{output} exists and has no {marker}: not replaced")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        folder = Path(scratch) / "new"
        folder.mkdir()
        yield folder
        if output.exists():
            output.rename(Path(scratch) / "old")
        folder.rename(output)
