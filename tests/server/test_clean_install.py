"""The wheel without extras in an environment of its own: the thin client and its command line."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from conftest import ROOT

HEAVY = ("torch", "diffusers", "transformers")
CLIENT = """
import importlib.util, sys
import genserve
assert genserve.__file__.startswith(sys.prefix), genserve.__file__
print(*(name for name in sys.argv[1:] if name in sys.modules or importlib.util.find_spec(name)))
"""


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env=environment, timeout=240
    )


def pip(python: str | Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run(python, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of an environment that has the wheel and what it requires."""
    folder = tmp_path_factory.mktemp("clean")
    reached = pip(sys.executable, "download", "--retries", "1", "--no-deps", "--dest", folder / "reached", "click")
    if reached.returncode:
        pytest.skip(f"the package registry is not reachable: {reached.stderr.strip().rpartition(chr(10))[2]}")
    built = pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("genserve-*.whl")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    installed = pip(python, "install", "--constraint", ROOT / "constraints.txt", wheel)
    assert installed.returncode == 0, installed.stderr
    return python


def test_client_is_importable_without_the_backend(clean: Path) -> None:
    found = run(clean, "-c", CLIENT, *HEAVY)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == []


def test_command_line_works(clean: Path) -> None:
    shown = run(clean.with_name("genserve"), "--help")
    assert shown.returncode == 0, shown.stderr
    assert "generate" in shown.stdout


def test_installed_packages_fit_together(clean: Path) -> None:
    checked = pip(clean, "check")
    assert checked.returncode == 0, checked.stdout


def test_unreachable_server_is_one_line(clean: Path) -> None:
    failed = run(clean.with_name("genserve"), "generate", "a circle", "-o", "circle.png", "--url", "127.0.0.1:9")
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1), failed.stderr
