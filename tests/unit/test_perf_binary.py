"""Which perf_analyzer the load test takes, and what it says about one that does not run."""

from __future__ import annotations

from pathlib import Path

import pytest

import perf_binary
from genserve.serve.options import ServeError


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty PATH, and wheels that are in the cache already."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("GENSERVE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(perf_binary, "fetch", lambda wheel: tmp_path / "cache" / wheel.folder_name)
    return tmp_path / "cache"


def test_takes_the_one_on_path(cache: Path, tmp_path: Path) -> None:
    installed = program(tmp_path / "bin" / "perf_analyzer", "exit 0")
    found = perf_binary.find()
    assert (found.path, found.source, found.environment) == (installed, "PATH", {})


def test_says_why_one_does_not_run(cache: Path, tmp_path: Path) -> None:
    program(tmp_path / "bin" / "perf_analyzer", "echo 'libssl.so.3: cannot open shared object file' >&2; exit 127")
    with pytest.raises(ServeError, match=r"perf_analyzer does not run: libssl\.so\.3: cannot open"):
        perf_binary.find()


def test_recent_glibc_takes_the_current_wheel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perf_binary, "glibc_version", lambda: (2, 39))
    binary = program(cache / "perf-analyzer-2.60.0" / "perf_analyzer" / "bin" / "perf_analyzer", "exit 0")
    found = perf_binary.find()
    assert (found.path, found.environment) == (binary, {})


def test_older_glibc_gets_the_libraries_that_the_binary_asks_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perf_binary, "glibc_version", lambda: (2, 36))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/own")
    program(cache / "tritonclient-2.51.0" / "bin" / "perf_analyzer", "exit 0")
    libraries = cache / "nvidia-pytriton-0.7.0" / "nvidia_pytriton.libs"
    libraries.mkdir(parents=True)
    for name in ("libb64-98cb6333.so.0d", "libcudart-09529672.so.12.6.77"):
        (libraries / name).write_text(name)
    links = cache / "perf_analyzer-libraries-nvidia-pytriton-0.7.0"
    links.mkdir()
    (links / "libb64.so.0d").symlink_to("gone")
    for _ in range(2):
        found = perf_binary.find()
        assert found.environment == {"LD_LIBRARY_PATH": f"{links}:/opt/own"}
        assert (links / "libb64.so.0d").read_text() == "libb64-98cb6333.so.0d"
        assert (links / "libcudart.so.12").read_text() == "libcudart-09529672.so.12.6.77"


def test_says_which_folder_is_incomplete(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perf_binary, "glibc_version", lambda: (2, 36))
    (cache / "nvidia-pytriton-0.7.0").mkdir(parents=True)
    with pytest.raises(ServeError, match=r"nvidia-pytriton-0\.7\.0 has no libb64-\*\.so\.0d: delete that folder"):
        perf_binary.find()
