"""Archive of served images in a folder, for test servers (SAVE_TEST_IMAGES)."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path

from genserve_backend.logs import log

MAX_NAME_CHARACTERS = 100

logger = logging.getLogger(__name__)


class ImageArchive:
    """A folder of image files, named by task id.

    Args:
        folder: The folder, created when needed; None disables the archive.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def save(self, task_id: str, data: bytes, extension: str) -> None:
        """Write one image. A write failure is logged; the request still succeeds."""
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"{file_name(task_id)}.{extension}").write_bytes(data)
        except OSError as error:
            log(logger, logging.WARNING, "image not archived", task_id=task_id, error=error.strerror)


def file_name(task_id: str) -> str:
    """Return a file name that cannot leave its folder, for any task id a caller may choose.

    Letters, digits, ``-``, ``_`` and inner dots are kept. A digest is added if the id has other characters, is too long
    or already ends like a digest: different ids have different names.
    """
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", task_id).strip(".")[:MAX_NAME_CHARACTERS]
    if plain == task_id and not re.search(r"-[0-9a-f]{12}$", plain):
        return plain
    digest = hashlib.sha256(task_id.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{plain}-{digest}"
