"""Keeps copies of the images in a folder, for those who test a server (SAVE_TEST_IMAGES)."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path

from genserve_backend.logs import log

MAX_NAME_CHARACTERS = 100

logger = logging.getLogger(__name__)


class Keeper:
    """Writes images into a folder, named by their task ids.

    Args:
        folder: Where; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def keep(self, task_id: str, data: bytes, extension: str) -> None:
        """Write one image. A folder that cannot be written costs nobody the answer."""
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"{file_name(task_id)}.{extension}").write_bytes(data)
        except OSError as error:
            log(logger, logging.WARNING, "image not kept", task_id=task_id, error=error.strerror)


def file_name(task_id: str) -> str:
    """A name that stays inside its folder whatever a caller chose as task id.

    Letters, digits, ``-``, ``_`` and inner dots are kept; an id with anything else, or too long, or that looks as if it
    had one, gets a digest: different ids have different names.
    """
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", task_id).strip(".")[:MAX_NAME_CHARACTERS]
    if plain == task_id and not re.search(r"-[0-9a-f]{12}$", plain):
        return plain
    digest = hashlib.sha256(task_id.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{plain}-{digest}"
