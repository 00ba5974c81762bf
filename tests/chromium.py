"""Chromium for tests of pages: the one on PATH, else Debian's, fetched without root."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CACHE = Path(os.environ.get("GENSERVE_CACHE_DIR", Path.home() / ".cache" / "genserve")) / "chromium"
NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",  # its sandbox needs user namespaces, which containers often lack
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
]


@dataclass(frozen=True)
class Chromium:
    """Program with the environment that it needs."""

    program: str
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def launch(self) -> dict[str, Any]:
        """Arguments of Playwright's `launch`, which gives each browser a new profile."""
        return {"executable_path": self.program, "args": ARGUMENTS, "env": {**os.environ, **self.environment}}


def find_chromium() -> Chromium:
    """Return the Chromium on PATH, else Debian's. Skip the test without either."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found:
        return Chromium(found)
    try:
        if not CACHE.exists():
            _fetch()
        libraries = CACHE / "usr" / "lib" / f"{os.uname().machine}-linux-gnu"
        chromium = Chromium(
            str(CACHE / "usr" / "lib" / "chromium" / "chromium"),
            {"LD_LIBRARY_PATH": f"{libraries}:{libraries / 'pulseaudio'}"},
        )
        _run(chromium.program, "--version", env={**os.environ, **chromium.environment})
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no Chromium on PATH, and Debian's cannot be fetched: {error}")
    return chromium


def _fetch() -> None:
    """Unpack Debian's Chromium and the libraries that this machine lacks into the cache: 120 MB, some seconds."""
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE.parent) as name:
        folder = Path(name)
        folder.chmod(0o755)
        try:
            _download(folder)
        except subprocess.CalledProcessError:
            if os.getuid():
                raise
            _run("apt-get", "update")  # The list of packages may be missing or too old.
            _download(folder)
        for package in folder.glob("*.deb"):
            _run("dpkg", "-x", str(package), str(folder / "files"))
        (folder / "files").rename(CACHE)


def _download(folder: Path) -> None:
    plan = _run("apt-get", "install", "--simulate", "--no-install-recommends", "chromium")
    names = [line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")]
    _run("apt-get", "download", *names, cwd=folder)


def _run(*command: str, **options: Any) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, **options)
    return done.stdout
