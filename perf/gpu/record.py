"""Results as JSON lines: each one is in the file as soon as it is known."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Line = dict[str, Any]

STARTED, RESULT, ENDED = "started", "result", "ended"
"""Kinds of lines: a call has started, something was measured, a part has ended."""


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Write one line and see it to the disk."""
    text = json.dumps(_plain(line), ensure_ascii=False) + "\n"
    with path.open("ab+") as file:
        # A process that was killed may have left half a line.
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read(paths: Iterable[Path]) -> list[Line]:
    """Return the lines of each stage's last call, in order; half a line is left out."""
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


def _plain(value: Any) -> Any:
    """Return `value` in types that JSON has; numbers that it lacks become text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)
