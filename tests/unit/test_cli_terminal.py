"""Output of `genserve generate` in a terminal: the step bar, and the image."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import selectors
import struct
import subprocess
import sys
import termios
import threading
import tty
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from genserve.cli import main
from genserve.protocol import Call, Outputs

FOLDER = Path(__file__).parent
PROGRAM = (
    "from test_cli_terminal import FakeServer; from genserve.cli import main;"
    " main(obj=FakeServer(looks={looks}), prog_name='genserve')"
)
SUMMARY = "64 x 32, 4 steps, seed 7, 1.23 s on cpu"
NO_SIXELS, SIXELS, KITTY = b"\x1b[?62c", b"\x1b[?62;4c", b"\x1b_Gi=1;OK\x1b\\"
"""A terminal's answers to questions about its abilities."""


class FakeServer:
    """Server that answers once somebody has looked at the image's progress a number of times.

    A look follows on the one before, whose result has then been reported.
    """

    url = "fake"

    def __init__(self, looks: int) -> None:
        self.looks = looks
        self.looked = threading.Semaphore(0)

    def infer(self, call: Call, timeout_s: float) -> Outputs:
        if call.model == "tasks":
            self.looked.release()
            task = {"task_id": "x", "state": "running", "step": 3, "steps": 4, "model": "flux", "instance": "flux_0_0"}
            return {
                "TASK": np.array([json.dumps(task).encode()], dtype=np.object_),
                "PREVIEW": np.array([b""], dtype=np.object_),
            }
        for _ in range(self.looks):
            assert self.looked.acquire(timeout=60)
        buffer = io.BytesIO()
        Image.new("RGB", (64, 32), (200, 30, 40)).save(buffer, "PNG")
        info = {"width": 64, "height": 32, "steps": 4, "elapsed_time": 1.234, "device": "cpu"}
        return {
            "IMAGE": np.array([[buffer.getvalue()]], dtype=np.object_),
            "SEED": np.array([[7]], dtype=np.int64),
            "INFO": np.array([[json.dumps(info).encode()]], dtype=np.object_),
        }

    def close(self) -> None:
        pass


@dataclass
class Shown:
    """Result of a command in a terminal."""

    exit_code: int
    stdout: str
    stderr: str


def in_terminal(*arguments: str, looks: int = 0, answers: bytes = NO_SIXELS, **streams: Any) -> Shown:
    """Run `genserve` with a terminal of 40 x 12 cells of 8 x 16 pixels as each of its streams.

    Args:
        arguments: Verb and options.
        looks: Number of looks at the image's progress.
        answers: What the terminal answers. It waits in the terminal from the start, so that no answer is late.
        streams: Other streams, as ``stdin=subprocess.DEVNULL``.
    """
    masters, terminals = zip(*(pty.openpty() for _ in range(2)), strict=True)
    for terminal in terminals:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 40, 320, 192))
        tty.setcbreak(terminal)
    os.write(masters[0], answers)
    path = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))
    environment = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "COLUMNS", "LINES"}}
    environment |= {"TERM": "xterm-256color", "COLORTERM": "truecolor", "PYTHONPATH": path}
    streams = {"stdin": terminals[0], "stdout": terminals[0], "stderr": terminals[1], **streams}
    command = [sys.executable, "-c", PROGRAM.format(looks=looks), *arguments]
    with subprocess.Popen(command, env=environment, **streams) as process:
        for terminal in terminals:
            os.close(terminal)
        stdout, stderr = everything(masters)
        process.wait(60)
    return Shown(process.returncode, stdout.decode(), stderr.decode())


def everything(masters: Sequence[int]) -> list[bytes]:
    """Return all that is written to terminals until nobody has them open."""
    output = dict.fromkeys(masters, b"")
    with selectors.DefaultSelector() as selector:
        for master in masters:
            selector.register(master, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                try:
                    data = os.read(key.fd, 65536)
                except OSError:  # Linux reports the end as an error.
                    data = b""
                output[key.fd] += data
                if not data:
                    selector.unregister(key.fd)
    for master in masters:
        os.close(master)
    return list(output.values())


def test_steps_are_shown_and_removed(tmp_path: Path) -> None:
    shown = in_terminal("generate", "x", "-o", str(tmp_path / "x.png"), looks=2)
    assert (shown.exit_code, shown.stdout) == (0, f"{tmp_path / 'x.png'}: {SUMMARY}\r\n")
    states = [state.strip() for state in shown.stderr.split("\r") if state.strip()]
    assert states[0].startswith("waiting |")
    assert any(state.startswith("running |") and " 3/4 steps" in state for state in states)
    assert shown.stderr.rpartition("steps")[2].split("\r")[-2].isspace()  # overwritten
    assert shown.stderr.endswith("\r")


@pytest.mark.parametrize("option", ["--json", "--quiet"])
def test_no_steps_are_shown_with(option: str, tmp_path: Path) -> None:
    shown = in_terminal("generate", "x", "-o", str(tmp_path / "x.png"), option)
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert bool(shown.stdout) == (option == "--json")
    assert (tmp_path / "x.png").exists()


def test_no_steps_are_shown_without_a_terminal(tmp_path: Path) -> None:
    shown = in_terminal("generate", "x", "-o", str(tmp_path / "x.png"), stderr=subprocess.DEVNULL)
    assert (shown.exit_code, shown.stdout) == (0, f"{tmp_path / 'x.png'}: {SUMMARY}\r\n")


@pytest.mark.parametrize(
    ("answers", "drawing"),
    [
        (SIXELS, "\x1bP"),
        (NO_SIXELS + KITTY, "\x1b_G"),
        (NO_SIXELS, "\x1b[38;2;200;30;40;48;2;200;30;40m\u2580"),
    ],
    ids=["sixels", "kitty", "half-blocks"],
)
def test_image_is_drawn_as_the_terminal_can(answers: bytes, drawing: str, tmp_path: Path) -> None:
    shown = in_terminal("generate", "x", "--show", answers=answers)
    assert shown.exit_code == 0, shown.stdout
    assert drawing in shown.stdout
    assert shown.stdout.endswith(f"{SUMMARY}\r\n")


def test_image_is_as_large_as_the_terminal_allows() -> None:
    lines = in_terminal("generate", "x", "--show").stdout.splitlines()
    assert [line.count("\u2580") for line in lines if "\u2580" in line] == [40] * 10


def test_image_is_drawn_and_written(tmp_path: Path) -> None:
    shown = in_terminal("generate", "x", "--show", "-o", str(tmp_path / "x.png"), "--quiet")
    assert shown.exit_code == 0
    assert "\u2580" in shown.stdout
    assert SUMMARY not in shown.stdout
    assert Image.open(tmp_path / "x.png").size == (64, 32)


@pytest.mark.parametrize("stream", ["stdin", "stdout"])
def test_image_needs_a_terminal(stream: str) -> None:
    shown = in_terminal("generate", "x", "--show", **{stream: subprocess.DEVNULL})
    assert shown.exit_code == 1
    assert shown.stderr == "genserve: --show needs a terminal as standard input and output\r\n"


def test_image_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "textual_image.renderable", None)
    for stream in ("__stdin__", "__stdout__"):
        monkeypatch.setattr(sys, stream, FakeTerminal())
    result = CliRunner().invoke(main, ["generate", "x", "--show"], prog_name="genserve")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "genserve: --show needs: pip install 'genserve[terminal]'\n"


class FakeTerminal(io.StringIO):
    """Stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Missing option '-o' / '--output', or '--show'."),
        (["--show", "--json"], "'--show' and '--json' exclude each other."),
    ],
    ids=["nowhere", "json"],
)
def test_image_needs_a_place(options: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["generate", "x", *options], prog_name="genserve")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"Error: {message}" in result.stderr
