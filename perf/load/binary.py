"""perf_analyzer's binary: the one on PATH, else the one inside a published wheel."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from genserve.serve.options import ServeError, cache_folder, make_folder
from genserve.serve.wheels import TRITON, Wheel, fetch, glibc_version, on_path

NAME = "perf_analyzer"
CURRENT = Wheel(
    "perf-analyzer", "2.60.0", ("23ef56b107ae9233e5cf09fbdf508dd9b936a52f1bae2f63f53c8117087b3f25",), glibc=(2, 38)
)
OLDER_GLIBC = Wheel(
    "tritonclient", "2.51.0", ("c485bb0123bdf310f90bc8b03d3489b28df2ffed55b30c7eee0b795b48113d52",), glibc=(2, 34)
)
"""The last release with the binary that runs on an older C library."""
LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
"""Libraries that the older binary links and few systems have. The Triton wheel has both under other names."""


@dataclass(frozen=True)
class Binary:
    """A perf_analyzer that runs on this machine."""

    path: Path
    source: str
    environment: dict[str, str] = field(default_factory=dict)
    """Variables in addition to this process's own."""


def find() -> Binary:
    """Return the perf_analyzer on PATH, as in NVIDIA's SDK container, else a downloaded one.

    Raises:
        ServeError: There is none for this platform, the download failed, or it does not run.
    """
    installed = on_path(NAME)
    binary = Binary(installed, "PATH") if installed else _fetched()
    _check_runs(binary)
    return binary


def _fetched() -> Binary:
    if glibc_version() >= CURRENT.glibc:
        return Binary(fetch(CURRENT) / NAME / "bin" / NAME, f"{CURRENT.name} {CURRENT.version}")
    folders = [str(_libraries()), os.environ.get("LD_LIBRARY_PATH", "")]
    return Binary(
        fetch(OLDER_GLIBC) / "bin" / NAME,
        f"{OLDER_GLIBC.name} {OLDER_GLIBC.version}",
        {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, folders))},
    )


def _libraries() -> Path:
    """Link the Triton wheel's libraries under the names that the older binary needs; return the folder."""
    wheel = fetch(TRITON)
    folder = make_folder(
        cache_folder() / f"{NAME}-libraries-{TRITON.folder_name}",
        setting="GENSERVE_CACHE_DIR",
    )
    for name, pattern in LIBRARIES.items():
        found = next((wheel / "nvidia_pytriton.libs").glob(pattern), None)
        if found is None:
            raise ServeError(f"{wheel} has no {pattern}: delete that folder, so that it is fetched again")
        link = folder / name
        if link.exists():
            continue
        link.unlink(missing_ok=True)  # the cache was moved
        try:
            link.symlink_to(os.path.relpath(found, folder))
        except FileExistsError:
            pass  # another run did the same at the same time
        except OSError as error:
            raise ServeError(f"cannot set up {folder}: {error.strerror}") from None
    return folder


def _check_runs(binary: Binary) -> None:
    try:
        result = subprocess.run(
            [binary.path, "--version"],
            env={**os.environ, **binary.environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServeError(f"{binary.path} does not run: {error}") from None
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"it ended with {result.returncode}"]
        raise ServeError(f"{binary.path} does not run: {lines[-1]}")
