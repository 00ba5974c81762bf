"""Findings of `genserve doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """Result of one check. A server starts despite warnings.

    Attributes:
        subject: The part that was checked, as ``torch`` or a model's name.
        state: ``ok``, ``warn`` or ``fail``.
        detail: One line; a failure says what to do about it where that is not obvious.
    """

    subject: str
    state: Literal["ok", "warn", "fail"]
    detail: str

    def __post_init__(self) -> None:
        # Names from a damaged file may hold line breaks, or characters that no terminal can print.
        printable = self.detail.encode("utf-8", "backslashreplace").decode()
        object.__setattr__(self, "detail", " ".join(printable.split()))


def in_units(size: float) -> str:
    """Return a number of bytes in the largest unit that leaves at least 1, as ``1.5 GiB``."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
