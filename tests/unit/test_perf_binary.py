"""The load test's choice of perf_analyzer, and its errors for one that does not run."""

from __future__ import annotations

from pathlib import Path

import pytest

from genserve.serve.options import ServeError
from load import binary


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty PATH, and a cache that has the wheels."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("GENSERVE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(binary, "fetch", lambda wheel: tmp_path / "cache" / wheel.folder_name)
    return tmp_path / "cache"


def test_find_prefers_path(cache: Path, tmp_path: Path) -> None:
    installed = program(tmp_path / "bin" / "perf_analyzer", "exit 0")
    found = binary.find()
    assert (found.path, found.source, found.environment) == (installed, "PATH", {})


def test_find_reports_why_a_binary_does_not_run(cache: Path, tmp_path: Path) -> None:
    program(tmp_path / "bin" / "perf_analyzer", "echo 'libssl.so.3: cannot open shared object file' >&2; exit 127")
    with pytest.raises(ServeError, match=r"perf_analyzer does not run: libssl\.so\.3: cannot open"):
        binary.find()


def test_recent_glibc_gets_the_current_wheel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary, "glibc_version", lambda: (2, 39))
    current = program(cache / "perf-analyzer-2.60.0" / "perf_analyzer" / "bin" / "perf_analyzer", "exit 0")
    found = binary.find()
    assert (found.path, found.environment) == (current, {})


def test_older_glibc_gets_the_libraries_of_the_older_binary(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary, "glibc_version", lambda: (2, 36))
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
        found = binary.find()
        assert found.environment == {"LD_LIBRARY_PATH": f"{links}:/opt/own"}
        assert (links / "libb64.so.0d").read_text() == "libb64-98cb6333.so.0d"
        assert (links / "libcudart.so.12").read_text() == "libcudart-09529672.so.12.6.77"


def test_incomplete_folder_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary, "glibc_version", lambda: (2, 36))
    (cache / "nvidia-pytriton-0.7.0").mkdir(parents=True)
    with pytest.raises(ServeError, match=r"nvidia-pytriton-0\.7\.0 has no libb64-\*\.so\.0d: delete that folder"):
        binary.find()
