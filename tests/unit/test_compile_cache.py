"""The folder for compiled code, and the end of the processes that make it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile

from genserve_backend.compilation import FOLDER_ENV, default_folder, stop_compilers, use_cache


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FOLDER_ENV, "")
    monkeypatch.setenv("GENSERVE_CACHE_DIR", str(tmp_path / "cache"))


def test_default_folder_is_in_the_cache_folder() -> None:
    assert default_folder({"GENSERVE_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a/compiled")
    assert default_folder({"XDG_CACHE_HOME": "/b"}) == Path("/b/genserve/compiled")
    assert default_folder({}) == Path.home() / ".cache" / "genserve" / "compiled"


def test_folder_is_private(tmp_path: Path) -> None:
    use_cache(None)
    folder = tmp_path / "cache" / "compiled"
    assert os.environ[FOLDER_ENV] == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_setting_comes_before_torchs_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FOLDER_ENV, "/torch")
    use_cache(None)
    assert os.environ[FOLDER_ENV] == "/torch"
    use_cache(tmp_path / "mine")
    assert os.environ[FOLDER_ENV] == str(tmp_path / "mine")


def test_start_goes_on_without_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file")
    use_cache(None)
    assert os.environ[FOLDER_ENV] == ""
    assert "compiled code is not kept" in caplog.text


def test_folder_of_another_user_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    use_cache(tmp_path)
    assert os.environ[FOLDER_ENV] == ""
    assert "compiled code is not kept" in caplog.text


def test_compilers_end() -> None:
    with config.patch(compile_threads=2):
        pool = AsyncCompile.process_pool()
        assert pool.submit(os.getpid).result() != os.getpid()
        assert pool.process.poll() is None
        stop_compilers()
        assert pool.process.poll() == 0
        assert AsyncCompile.process_pool() is not pool, "later code finds new processes"
        stop_compilers()
