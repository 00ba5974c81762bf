"""Files that `genserve tune` writes: an environment file and a start script."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path

from genserve.serve.options import ServeError

ENVIRONMENT_FILE = "genserve-tuned.env"
SCRIPT_FILE = "genserve-tuned.sh"
FILES = (ENVIRONMENT_FILE, SCRIPT_FILE)
PACKAGES = ("genserve", "torch", "diffusers", "transformers")
CPU_INFO = Path("/proc/cpuinfo")


def check_folder(folder: Path, *, force: bool) -> None:
    """Create the folder of the files, before anything is measured.

    Raises:
        ServeError: It cannot be written, or has the files and they must not be replaced.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ServeError(f"cannot create {folder}: {error.strerror}") from None
    there = [name for name in FILES if (folder / name).exists()]
    if there and not force:
        raise ServeError(f"{folder / there[0]} exists; --force replaces it")


def write_files(folder: Path, environment: str, script: str) -> None:
    """Write both files, each at once.

    Raises:
        ServeError: They cannot be written.
    """
    for name, text, mode in ((ENVIRONMENT_FILE, environment, 0o644), (SCRIPT_FILE, script, 0o755)):
        half = folder / f"{name}.part"
        try:
            half.write_text(text, encoding="utf-8")
            half.chmod(mode)
            half.replace(folder / name)
        except OSError as error:
            raise ServeError(f"cannot write {folder / name}: {error.strerror}") from None


def environment_text(
    tuned: Mapping[str, str], kept: Mapping[str, str], remarks: Sequence[str], *, devices: Sequence[str], now: datetime
) -> str:
    """Return the environment file: lines NAME=VALUE for a shell, for systemd, and without quotes also for Docker.

    Args:
        tuned: The tuned variables; an empty value selects the default.
        kept: Other settings in force.
        remarks: Lines on the measurements.
        devices: Names of the devices.
        now: Time of writing.
    """
    lines = [
        f"Written by genserve tune on {now:%Y-%m-%d %H:%M %Z}".rstrip(),
        f"Machine: {platform.node()}, {_cpu()}, {', '.join(devices)}",
        f"Versions: Python {platform.python_version()}, {', '.join(_versions())}",
        *remarks,
    ]
    parts = ["".join(f"# {' '.join(line.split())}\n" for line in lines)]
    if tuned:
        parts.append("# Tuned; nothing after = selects the default.\n" + _assignments(tuned))
    if kept:
        parts.append("# In force before, and kept.\n" + _assignments(kept))
    return "\n".join(parts)


def script_text(options: Sequence[str]) -> str:
    """Return the start script, which passes its own arguments on.

    Args:
        options: Options of `genserve serve`.
    """
    command = " ".join(["exec genserve serve", *map(shlex.quote, options), '"$@"'])
    lines = [
        "#!/bin/sh",
        "# Start the server with the settings that genserve tune has found.",
        "set -eu",
        "set -a",
        f'. "$(cd "$(dirname "$0")" && pwd)/{ENVIRONMENT_FILE}"',
        "set +a",
        command,
    ]
    return "\n".join(lines) + "\n"


def _assignments(values: Mapping[str, str]) -> str:
    return "".join(f"{name}={shlex.quote(value) if value else ''}\n" for name, value in values.items())


def _versions() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
