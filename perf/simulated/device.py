"""Devices as tables of times: measured on a device, or given. No torch: workers and the virtual clock share them.

A step's time depends on its batch rows and on the image tokens of a row. At each size of the table it is linear between
the measured numbers of rows, and beyond them it goes on as between the last two: so what a launch costs is in the first
row, and a row more costs what it was measured to cost. Between two sizes it is linear in the work of a row, beyond the
largest it grows with the work, and below the smallest it shrinks with it, but not below the table's `floor_s`, which is
what the host needs to launch a step of any size. The work of a row is that of a transformer with attention: with L
tokens of text and image, ``L + L * L / (6 * width)``. Decodings and files are linear between their points, and
proportional to the tokens beyond.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

DEVICES = Path(__file__).parent / "devices"
PARTS = ("step", "encode", "decode", "file")
Points = tuple[tuple[float, float], ...]
"""Arguments and seconds, by rising argument."""


class TableError(Exception):
    """A table that cannot be used; the message is one line."""


@dataclass(frozen=True)
class Device:
    """A simulated device.

    Attributes:
        name: Its name in tables.
        source: Origin of the numbers, and which of them were measured.
        steps: Seconds of a step by number of rows, for each number of image tokens.
        encode: Seconds of an encoding by number of prompts.
        decode: Seconds of the device for one image by its tokens.
        file: Seconds of the host for one image's file by its tokens, beside the device.
        text_tokens: Text tokens of a row.
        width: Width of the transformer; 0 if a step's time does not depend on the tokens.
        floor_s: Least seconds of a step.
        kind: Device type in torch's notation, which the engine's limits depend on.
    """

    name: str
    source: str
    steps: Mapping[int, Points]
    encode: Points = ((0, 0.0),)
    decode: Points = ((0, 0.0),)
    file: Points = ((0, 0.0),)
    text_tokens: int = 0
    width: int = 0
    floor_s: float = 0.0
    kind: str = "cpu"
    _step_s: dict[tuple[int, int], float] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def per_row(cls, step_s: float) -> Device:
        """Return a device whose step takes a fixed time per row, and everything else none."""
        return cls(f"{step_s:g} s a row", "given", {1: ((0, 0.0), (1, step_s))})

    @classmethod
    def load(cls, text: str, *, compiled: bool = False) -> Device:
        """Return the device that a text names: seconds per row, a table of `DEVICES`, or a table's path.

        ``@FACTOR`` behind it multiplies all times, to run a slow device faster.

        Args:
            text: The name, as in ``0.05``, ``h200`` or ``h200@0.1``.
            compiled: Use the steps with compiled blocks.

        Raises:
            TableError: There is no such table, or it has no steps of this kind.
        """
        name, _, factor = text.partition("@")
        try:
            try:
                device = cls.per_row(float(name))
            except ValueError:
                path = Path(name) if name.endswith(".json") else DEVICES / f"{name}.json"
                device = cls._parse(json.loads(path.read_text(encoding="utf-8")), compiled=compiled)
            return device.times(float(factor)) if factor else device
        except OSError:
            known = ", ".join(sorted(each.stem for each in DEVICES.glob("*.json")))
            raise TableError(f"there is no device {name!r}; known: {known}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise TableError(f"the device {text!r} cannot be parsed: {error}") from None

    @classmethod
    def _parse(cls, table: Mapping[str, Any], *, compiled: bool) -> Device:
        kind = "compiled" if compiled else "eager"
        if kind not in table["step"]:
            raise ValueError(f"it has no {kind} steps")
        sizes: dict[int, list[tuple[float, float]]] = {}
        for tokens, rows, seconds in table["step"][kind]:
            sizes.setdefault(tokens, []).append((rows, seconds))
        flags = {part: "measured" if table[part]["measured"] else "given" for part in PARTS}
        return cls(
            name=f"{table['name']}, {kind}",
            source="; ".join(f"{part} {flag}: {table[part]['source']}" for part, flag in flags.items()),
            steps={tokens: _points(sizes[tokens]) for tokens in sorted(sizes)},
            encode=_points(table["encode"]["points"]),
            decode=_points(table["decode"]["points"]),
            file=_points(table["file"]["points"]),
            text_tokens=table["text_tokens"],
            width=table["width"],
            floor_s=table["step"]["floor_s"],
            kind=table["kind"],
        )

    def times(self, factor: float) -> Device:
        """Return the device with all times multiplied."""

        def scaled(points: Points) -> Points:
            return tuple((at, factor * seconds) for at, seconds in points)

        return replace(
            self,
            name=f"{self.name}, times {factor:g}",
            steps={tokens: scaled(points) for tokens, points in self.steps.items()},
            encode=scaled(self.encode),
            decode=scaled(self.decode),
            file=scaled(self.file),
            floor_s=factor * self.floor_s,
            _step_s={},
        )

    def step_s(self, rows: int, tokens: int) -> float:
        """Return the seconds of a step of `rows` batch rows with `tokens` image tokens each."""
        key = rows, tokens
        if key not in self._step_s:
            self._step_s[key] = max(self.floor_s, self._interpolate(rows, tokens))
        return self._step_s[key]

    def _interpolate(self, rows: int, tokens: int) -> float:
        sizes = list(self.steps)
        if len(sizes) == 1 or tokens <= sizes[0] or tokens >= sizes[-1]:
            nearest = sizes[0] if tokens <= sizes[0] else sizes[-1]
            return _at(self.steps[nearest], rows) * self._work(tokens) / self._work(nearest)
        above = next(size for size in sizes if size >= tokens)
        below = sizes[sizes.index(above) - 1]
        share = (self._work(tokens) - self._work(below)) / (self._work(above) - self._work(below))
        return (1 - share) * _at(self.steps[below], rows) + share * _at(self.steps[above], rows)

    def _work(self, tokens: int) -> float:
        if not self.width:
            return 1.0
        length = tokens + self.text_tokens
        return length + length * length / (6 * self.width)

    def encode_s(self, prompts: int) -> float:
        """Return the seconds of an encoding of several prompts."""
        return _at(self.encode, prompts) if prompts else 0.0

    def decode_s(self, tokens: int) -> float:
        """Return the device's seconds for one image's decoding."""
        return _proportional(self.decode, tokens)

    def file_s(self, tokens: int) -> float:
        """Return the host's seconds for one image's file."""
        return _proportional(self.file, tokens)

    def busy_s(self, *, rows: int, tokens: int, steps: int) -> float:
        """Return the time for which an image needs the device to itself."""
        return self.encode_s(rows) + steps * self.step_s(rows, tokens) + self.decode_s(tokens)

    def own_s(self, *, rows: int, tokens: int, steps: int) -> float:
        """Return an image's own time: alone on the device, from its encoding to its file."""
        return self.busy_s(rows=rows, tokens=tokens, steps=steps) + self.file_s(tokens)


def _points(pairs: Sequence[Sequence[float]]) -> Points:
    points = tuple(sorted((float(at), float(seconds)) for at, seconds in pairs))
    if not points or any(seconds < 0 for _, seconds in points):
        raise ValueError("points are pairs of numbers, with seconds of 0 or more")
    return points


def _at(points: Points, value: float) -> float:
    """Return the linear interpolation; beyond the points, that of the two at the end."""
    if len(points) == 1:
        return points[0][1]
    last = next((index for index in range(1, len(points)) if points[index][0] >= value), len(points) - 1)
    (x0, y0), (x1, y1) = points[last - 1], points[last]
    return y0 + (y1 - y0) * (value - x0) / (x1 - x0)


def _proportional(points: Points, value: float) -> float:
    """Return the linear interpolation; beyond the points, in proportion to the nearest one."""
    if points[0][0] < value < points[-1][0]:
        return _at(points, value)
    at, seconds = points[0] if value <= points[0][0] else points[-1]
    return seconds * value / at if at else seconds
