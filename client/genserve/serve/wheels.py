"""Binaries from wheels, each fetched once by pip with a pinned hash.

They are stored below the cache folder, never in the project's environment: their other requirements conflict with it.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from genserve.serve.options import ServeError, cache_folder, make_folder


@dataclass(frozen=True)
class Wheel:
    """Pinned wheel.

    Attributes:
        name: Name of the package.
        version: Version of the package.
        sha256: Hashes of the allowed builds.
        glibc: Oldest supported glibc.
        per_python: Each Python version has its own build.
    """

    name: str
    version: str
    sha256: tuple[str, ...]
    glibc: tuple[int, int]
    per_python: bool = False

    @property
    def folder_name(self) -> str:
        """Name of the wheel's folder in the cache."""
        python = f"-cp{sys.version_info.major}{sys.version_info.minor}" if self.per_python else ""
        return f"{self.name}-{self.version}{python}"


TRITON = Wheel(
    "nvidia-pytriton", "0.7.0", ("21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df",), glibc=(2, 35)
)
STUB_NUMPY = Wheel(
    "numpy",
    "1.26.4",
    (
        "ffa75af20b44f8dba823498024771d5ac50620e6915abac414251bd971b4529f",  # Python 3.10
        "666dbfb6ec68962c033a450943ded891bed2d54e6755e35e5835d63f4f6931d5",  # Python 3.11
        "675d61ffbfa78604709862923189bad94014bef562cc35cf61d3a07bba02a7ed",  # Python 3.12
    ),
    glibc=(2, 17),
    per_python=True,
)
"""numpy for Triton's stub, which was compiled for numpy 1: with numpy 2 its arrays have a wrong item size.

Workers use the environment's numpy."""


def check_platform(wheel: Wheel) -> None:
    """Check that the wheel's binaries run here.

    Raises:
        ServeError: The platform or its glibc is not supported.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise ServeError(
            f"{wheel.name} has binaries for Linux on x86_64 only, and this is {platform.system()} on"
            f" {platform.machine()}: use the container there"
        )
    glibc = glibc_version()
    if glibc < wheel.glibc:
        found = ".".join(map(str, glibc)) if glibc != (0, 0) else "none (musl?)"
        wanted = ".".join(map(str, wheel.glibc))
        raise ServeError(f"{wheel.name} needs glibc {wanted} or later, found {found}: use the container there")


def glibc_version() -> tuple[int, int]:
    """Return the version of the running glibc, (0, 0) for another C library."""
    name, version = platform.libc_ver()
    if name != "glibc":
        return 0, 0
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def fetch(wheel: Wheel) -> Path:
    """Return the folder with the wheel's files, fetched on first use.

    Raises:
        ServeError: The platform is not supported, the cache is not writable, or pip fails.
    """
    check_platform(wheel)
    folder = cache_folder() / wheel.folder_name
    if folder.is_dir():
        return folder
    cache = make_folder(cache_folder(), setting="GENSERVE_CACHE_DIR")
    with FileLock(cache / f"{folder.name}.lock"):
        if not folder.is_dir():
            print(f"fetching {wheel.name} {wheel.version} into {cache} (once)", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as temporary:
                _pip_install(wheel, Path(temporary) / "files")
                (Path(temporary) / "files").rename(folder)
    return folder


def _pip_install(wheel: Wheel, target: Path) -> None:
    requirements = target.with_name("requirements.txt")
    hashes = " ".join(f"--hash=sha256:{digest}" for digest in wheel.sha256)
    requirements.write_text(f"{wheel.name}=={wheel.version} {hashes}\n")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--require-hashes", "--only-binary=:all:", "--no-compile"]
    command += ["--target", str(target), "--requirement", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.splitlines()
        errors = [line for line in lines if line.startswith("ERROR:")] or lines
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with {result.returncode}"
        raise ServeError(f"cannot fetch {wheel.name} {wheel.version}: {reason}")


def on_path(name: str) -> Path | None:
    """Return the path of an installed program, or None."""
    found = shutil.which(name)
    return Path(found) if found else None
