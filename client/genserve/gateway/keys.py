"""API keys: names and hashes in a file, which is read again when it has changed."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from genserve.gateway.limiter import Limits
from genserve.gateway.logs import log

PREFIX = "gs-"
"""Beginning of every key, by which scanners for leaked secrets can know it."""
KEY_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HASH = re.compile(r"[0-9a-f]{64}")

logger = logging.getLogger(__name__)
Version = tuple[int, int, int]


class KeysError(Exception):
    """Unreadable or damaged file of keys, with a one-line reason that contains no hash."""


@dataclass(frozen=True)
class Key:
    """One caller's key.

    Attributes:
        name: Name for logs and limits.
        digest: SHA-256 of the key, in hexadecimal digits.
        limits: Its own limits.
    """

    name: str
    digest: str
    limits: Limits


class Keyring:
    """Keys in force.

    A key has 256 random bits, so its SHA-256 cannot be guessed from the file, and no slow hash is needed.

    Args:
        source: Path of a file of keys, or the lines of one.

    Raises:
        KeysError: The file is unreadable or damaged.
    """

    def __init__(self, source: str) -> None:
        self._path = None if _is_lines(source) else Path(source)
        self._version = self._path and _version(self._path)
        self._keys = parse(source, "the keys") if self._path is None else _read(self._path)

    def find(self, key: str) -> Key | None:
        """Return the owner of a key, None for a wrong one."""
        self._refresh()
        digest = digest_of(key)
        found = self._keys.get(digest)  # tells nothing about the keys: nobody can choose a key's hash
        return found if found and hmac.compare_digest(found.digest, digest) else None

    def _refresh(self) -> None:
        """Read a changed file. A damaged one changes nothing."""
        if self._path is None:
            return
        version = _version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._keys = _read(self._path)
        except KeysError as error:
            log(logger, logging.ERROR, "keys not read; the former ones stay in force", error=error)
        else:
            log(logger, logging.INFO, "keys read", count=len(self._keys))


def digest_of(key: str) -> str:
    """Return the hash of a key as the file has it."""
    return hashlib.sha256(key.encode()).hexdigest()


def parse(text: str, place: str) -> dict[str, Key]:
    """Return the keys by digest.

    Args:
        text: A line per key: name, SHA-256, and optionally ``rate=60/minute`` and ``concurrency=4``. Empty lines and
            lines that begin with ``#`` are skipped.
        place: Name of the source, for messages.

    Raises:
        KeysError: A line has another form.
    """
    keys: dict[str, Key] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            key = _parse_line(line)
            if key.digest in keys or key.name in {other.name for other in keys.values()}:
                raise ValueError("the name or the key is there already")
        except ValueError as error:
            raise KeysError(f"{place}, line {number}: {error}") from None
        keys[key.digest] = key
    return keys


def draw_key(path: Path, name: str, limits: Mapping[str, object]) -> str:
    """Draw a key, append its line to a file, and return it. The file is created for this user only.

    Raises:
        KeysError: The name is taken or has another form, or the file is damaged or cannot be written.
    """
    key = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    given = [f"{option}={value}" for option, value in limits.items() if value is not None]
    line = " ".join([name, digest_of(key), *given])
    try:
        before = path.read_text() if path.exists() else ""
        joint = "" if before.endswith("\n") or not before else "\n"
        parse(f"{before}{joint}{line}", str(path))
        with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a") as file:  # noqa: PTH123
            file.write(f"{joint}{line}\n")
    except OSError as error:
        raise KeysError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise KeysError(f"{path} is not text") from None
    return key


def _parse_line(line: str) -> Key:
    name, _, rest = line.strip().partition(" ")
    digest, *given = rest.split() or [""]
    if not _NAME.fullmatch(name):
        raise ValueError("the name is not usable; allowed: 1 to 64 letters, digits, dots, hyphens and underscores")
    if not _HASH.fullmatch(digest):
        raise ValueError("after the name, there is no SHA-256 in 64 hexadecimal digits")
    values = dict(word.partition("=")[::2] for word in given)
    if not values.keys() <= {"rate", "concurrency"} or len(values) < len(given):
        raise ValueError("after the hash, only rate=N/TIME and concurrency=N may follow")
    return Key(name, digest, Limits.parse(**values))


def _is_lines(source: str) -> bool:
    return "\n" in source or any(map(_HASH.fullmatch, source.split()))


def _read(path: Path) -> dict[str, Key]:
    try:
        return parse(path.read_text(), str(path))
    except OSError as error:
        raise KeysError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise KeysError(f"{path} is not text") from None


def _version(path: Path) -> Version | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
