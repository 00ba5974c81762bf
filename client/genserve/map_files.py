"""Files of `genserve map`: tasks, results, and images."""

from __future__ import annotations

import codecs
import fcntl
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from genserve.errors import GenServeError, InvalidInput
from genserve.types import GeneratedImage, Ranking

IMAGE_SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
PLAIN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Ids that are file names as they are. All others become a hash behind an underscore, which no such id starts with."""
BEFORE_ID = b'{"id": "'
ID = re.compile(rb'(?:[^"\\]|\\.)*')
AFTER_ID = (b'", "ok": true, "', b'", "ok": false, "')
"""Start of every line that `Results` writes."""


class FileProblem(Exception):
    """Unusable file; the message names it."""


@dataclass(frozen=True)
class MapTask:
    """One line of a file of tasks.

    Attributes:
        id: The line's id, else its number.
        arguments: Arguments of `generate` or `rerank`; empty if the line is unusable.
        problem: The reason why the line is unusable, else None.
    """

    id: str
    arguments: dict[str, Any]
    problem: InvalidInput | None = None


def parse_tasks(lines: Iterable[bytes]) -> Iterator[MapTask]:
    """Yield the task of each line that is not blank."""
    for number, line in enumerate(lines, 1):
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if text.strip():
            try:
                yield _task(json.loads(text.decode()), str(number))
            except UnicodeDecodeError:  # json.loads itself would accept other encodings, and halves of characters
                yield MapTask(str(number), {}, InvalidInput(f"line {number} is not UTF-8"))
            except (ValueError, RecursionError):
                yield MapTask(str(number), {}, InvalidInput(f"line {number} is not JSON"))


def _task(value: Any, number: str) -> MapTask:
    if not isinstance(value, dict):
        return MapTask(number, {}, InvalidInput(f"line {number} is not a JSON object"))
    task_id = value.pop("id", number)
    if not isinstance(task_id, str) or not task_id:
        return MapTask(number, {}, InvalidInput(f"line {number}: id is {task_id!r:.80}; allowed: a text, not empty"))
    return MapTask(task_id, value)


class Results:
    """File of results, one JSON object per line. It survives the end of the process at any moment.

    A line that was being written at that moment is removed, and its task is done again. The file is locked: two
    processes cannot write to it.

    Args:
        path: The file; it need not exist.
        images: Folder for the images.
        retry_failed: Remove the results of failed tasks, so that they are done again.

    Attributes:
        ids: Ids of the tasks that had a result when the file was opened.
        failed: Those of them that failed.

    Raises:
        FileProblem: The file cannot be read or written, is in use, or contains anything but results. It is unchanged.
    """

    def __init__(self, path: Path, images: Path, *, retry_failed: bool = False) -> None:
        self._path = path
        self._images = images
        self.ids: set[str] = set()
        self.failed: set[str] = set()
        try:
            self._file = _locked(path)
            try:
                self._read(retry_failed=retry_failed)
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise FileProblem(f"cannot write {path}: {error.strerror}") from None

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def add_image(self, task: MapTask, image: GeneratedImage) -> None:
        """Write an image, and then its result."""
        suffix = IMAGE_SUFFIXES.get(str(task.arguments.get("format")), ".png")
        file = self._images / f"{file_stem(task.id)}{suffix}"
        half = file.with_name(f"{file.name}.part")
        try:
            self._images.mkdir(parents=True, exist_ok=True)
            half.write_bytes(image.data)
            half.replace(file)
        except OSError as error:
            raise FileProblem(f"cannot write {file}: {error.strerror}") from None
        self._add(task, ok=True, file=str(file), seed=image.seed, info=image.info)

    def add_ranking(self, task: MapTask, ranking: Ranking) -> None:
        """Write a ranking."""
        self._add(task, ok=True, ranking=[asdict(document) for document in ranking], info=ranking.info)

    def add_error(self, task: MapTask, error: GenServeError) -> None:
        """Write the error of a failed task."""
        self._add(task, ok=False, error={"class": type(error).__name__, "message": str(error)})

    def _add(self, task: MapTask, **values: Any) -> None:
        text = json.dumps({"id": task.id, **values}, ensure_ascii=False) + "\n"
        # Half a surrogate pair, as an id or a path may contain, is no UTF-8. Its backslashed form is JSON's.
        line = text.encode(errors="backslashreplace")
        try:
            _write(self._file, line)
        except OSError as error:
            raise FileProblem(f"cannot write {self._path}: {error.strerror}") from None

    def _read(self, *, retry_failed: bool) -> None:
        """Collect the ids, and place the end of the file behind the last whole line that stays."""
        again: set[int] = set()
        end = 0
        with open(self._file, "rb", closefd=False) as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    if not is_half_result(line):
                        raise self._foreign(number)
                    break
                result = self._result(line, number)
                if result["ok"]:
                    self.ids.add(result["id"])
                elif retry_failed:
                    again.add(number)
                else:
                    self.ids.add(result["id"])
                    self.failed.add(result["id"])
                end += len(line)
        if again:
            self._replace(end, again)
        else:
            os.ftruncate(self._file, end)
        os.lseek(self._file, 0, os.SEEK_END)

    def _result(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            result = json.loads(line)
        except (ValueError, RecursionError):
            result = None
        if (
            not isinstance(result, dict)
            or not isinstance(result.get("id"), str)
            or not isinstance(result.get("ok"), bool)
        ):
            raise self._foreign(number)
        return result

    def _foreign(self, number: int) -> FileProblem:
        return FileProblem(f"{self._path}, line {number}, is not a result of `genserve map`; choose another file")

    def _replace(self, end: int, again: set[int]) -> None:
        """Replace the file by one without some lines, at once: a kill leaves either of the two.

        Args:
            end: Size of all whole lines, in bytes.
            again: Numbers of the lines to leave out.
        """
        path = self._path.resolve()  # The target of a link, which stays one.
        half = path.with_name(f"{path.name}.part")
        new = _locked(half)
        try:
            os.ftruncate(new, 0)
            os.fchmod(new, stat.S_IMODE(os.fstat(self._file).st_mode))
            os.lseek(self._file, 0, os.SEEK_SET)
            with open(self._file, "rb", closefd=False) as lines:
                for number, line in enumerate(lines, 1):
                    if end == 0:
                        break
                    end -= len(line)
                    if number not in again:
                        _write(new, line)
            half.replace(path)
        except BaseException:
            os.close(new)
            raise
        old, self._file = self._file, new
        os.close(old)


def _locked(path: Path) -> int:
    """Open a file for reading and writing, for this process alone; return its descriptor."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise FileProblem(f"{path} is not a regular file")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The process that had the lock until now may have replaced the file.
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                return file
        except BlockingIOError:
            os.close(file)
            raise FileProblem(f"{path} is in use by another `genserve map`") from None
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def is_half_result(line: bytes) -> bool:
    """Return whether a line without its end is the start of a result."""
    if not line.startswith(BEFORE_ID):
        return BEFORE_ID.startswith(line)
    found = ID.match(line, len(BEFORE_ID))
    rest = line[found.end() :] if found else line
    # Equal as far as both go. A kill may also divide an escape sequence of the id.
    return rest == b"\\" or any(rest[: len(each)] == each[: len(rest)] for each in AFTER_ID)


def file_stem(task_id: str) -> str:
    """Return the file name of a task's image without suffix. Different ids have different names."""
    if PLAIN_ID.fullmatch(task_id):
        return task_id
    return f"_{hashlib.sha256(task_id.encode(errors='surrogatepass')).hexdigest()[:32]}"
