"""Files of generated images: written whole, under names that nobody can guess, for a limited time.

A file's name says when it expires. So the folder is swept without a database, whoever wrote the file and whatever
became of its task, and gateways may share it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import time
from pathlib import Path

from fastapi import APIRouter, Request, Response

from genserve.gateway.errors import Failure
from genserve.types import ImageFormat

router = APIRouter(tags=["tasks"])

PATH = "/files/"
TOKEN_BYTES = 32
HALF_SUFFIX = ".part"
HALF_KEPT_S = 3600.0
"""Seconds after which a file that was never finished is removed."""
_NAME = re.compile(r"(?P<expires>[0-9]{1,12})-[A-Za-z0-9_-]{43}\.(?P<format>png|jpeg|webp)")


class ResultFiles:
    """Folder of images.

    Args:
        folder: The folder, created when the first file is written, with access for this user only.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def save(self, data: bytes, image_format: ImageFormat, keep_s: float) -> str:
        """Write a file and return its name once the file is on the disk.

        Args:
            data: The image.
            image_format: Its encoding.
            keep_s: Seconds until it expires.

        Raises:
            OSError: The file cannot be written.
        """
        expires = int(time.time() + keep_s) + 1
        name = f"{expires}-{secrets.token_urlsafe(TOKEN_BYTES)}.{image_format}"
        writing = asyncio.ensure_future(asyncio.to_thread(self._write, name, data))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:  # The thread goes on, and nobody learns the name.
            writing.add_done_callback(lambda _: _unlink(self._folder / name))
            raise
        return name

    async def read(self, name: str) -> bytes | None:
        """Return a file's bytes, None if there is none with this name or its time is over."""
        if seconds_left(name) <= 0:
            return None
        try:
            return await asyncio.to_thread((self._folder / name).read_bytes)
        except OSError:
            return None

    async def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        if _NAME.fullmatch(name):
            await asyncio.to_thread(_unlink, self._folder / name)

    async def sweep(self) -> None:
        """Remove expired files, and those that were never finished. Other files stay."""
        await asyncio.to_thread(self._sweep)

    def _write(self, name: str, data: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        half = self._folder / f".{name}{HALF_SUFFIX}"
        try:
            with open(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:  # noqa: PTH123
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            half.rename(self._folder / name)
        except BaseException:
            _unlink(half)
            raise
        _flush(self._folder)

    def _sweep(self) -> None:
        if not self._folder.is_dir():
            return
        for path in self._folder.iterdir():
            name = path.name.removeprefix(".").removesuffix(HALF_SUFFIX)
            if not _NAME.fullmatch(name):
                continue
            with contextlib.suppress(OSError):  # as removed by another gateway
                is_half = path.name != name and time.time() - path.stat().st_mtime > HALF_KEPT_S
                if is_half or seconds_left(path.name, default=1) <= 0:
                    path.unlink()


def seconds_left(name: str, *, default: int = 0) -> int:
    """Return the seconds until the file with this name expires, `default` if no file has such a name."""
    found = _NAME.fullmatch(name)
    return int(found["expires"]) - int(time.time()) if found else default


@router.get(f"{PATH}{{name}}", summary="Image of a task or of an answer with URLs", response_class=Response)
async def image(name: str, request: Request) -> Response:
    """Return an image. Its name is the permission."""
    files: ResultFiles | None = request.app.state.durable.files
    data = await files.read(name) if files else None
    if data is None:
        raise Failure(404, "NotFound", "there is no such file, or its time is over")
    headers = {
        "Cache-Control": f"private, max-age={max(0, seconds_left(name))}, immutable",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'",
    }
    return Response(data, media_type=f"image/{name.rpartition('.')[2]}", headers=headers)


router.add_api_route(f"{PATH}{{name}}", image, methods=["HEAD"], include_in_schema=False, response_class=Response)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _flush(folder: Path) -> None:
    """Write the folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
