"""Results as JSON lines, written at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.plain import plain

Line = dict[str, Any]

STARTED, RESULT, ENDED = "started", "result", "ended"
"""Kinds of lines: start of a call, result, end of a part."""


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Write one line and flush it to the disk."""
    text = json.dumps(plain(line), ensure_ascii=False) + "\n"
    with path.open("ab+") as file:
        # A killed process may have left an incomplete line.
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read(paths: Iterable[Path]) -> list[Line]:
    """Return the lines of each stage's last call, in order, without incomplete lines."""
    lines: list[Line] = []
    for path in paths:
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and "stage" in line:
                if line.get("kind") == STARTED:
                    lines = [other for other in lines if other["stage"] != line["stage"]]
                lines.append(line)
    return lines
