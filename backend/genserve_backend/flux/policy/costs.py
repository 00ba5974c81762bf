"""Costs: the time that work takes on the device, as measured so far."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

KNOWN_AFTER = 20
"""Forwards after which the estimates can be relied on."""
SETTLED_AFTER = 3
"""Samples of which the lowest one counts: the first forwards of a shape also choose kernels and allocate memory."""
WEIGHT = 0.1
"""Weight of a new sample afterwards."""
MAX_RATIO = 2.0
"""Largest ratio of a sample to the mean that counts: a single stall says little about the next forward."""
MAX_SHAPES = 64
"""Shapes that are remembered, the latest ones."""


class MeasuredCosts:
    """Estimates from the engine's own forwards, encodings and decodings.

    A shape that was measured has its own mean. Others follow from a line through the means, in the number of tokens;
    those of a forward include the tokens of the prompts.

    Args:
        text_tokens: Tokens of a prompt, in every batch row.
    """

    def __init__(self, *, text_tokens: int) -> None:
        self._text_tokens = text_tokens
        self._forwards = 0
        self._steps = _Table()
        self._encode = _Mean()
        self._decodes = _Table()

    def observe_step(self, batch_rows: int, tokens: int, seconds: float) -> None:
        """Record a forward of `batch_rows` rows with `tokens` image tokens each, in which no row was skipped."""
        self._steps.add((batch_rows, tokens), batch_rows * (tokens + self._text_tokens), seconds)
        self._forwards += 1

    def observe_encode(self, seconds: float) -> None:
        """Record an encoding of prompts."""
        self._encode.add(seconds)

    def observe_decode(self, tokens: int, seconds: float) -> None:
        """Record the time from an image's last step to its answer; callable from any thread."""
        self._decodes.add((1, tokens), tokens, seconds)

    @property
    def are_known(self) -> bool:
        """True once enough was measured for the estimates to be relied on."""
        return self._forwards >= KNOWN_AFTER

    def step_s(self, batch_rows: int, tokens: int) -> float:
        """Return the seconds of a forward of `batch_rows` rows with `tokens` image tokens each."""
        return self._steps.seconds((batch_rows, tokens), batch_rows * (tokens + self._text_tokens))

    def has_measured(self, batch_rows: int, tokens: int) -> bool:
        """Return whether the estimate of `step_s` was measured; else it follows from other shapes."""
        return self._steps.has((batch_rows, tokens))

    def encode_s(self) -> float:
        """Return the seconds of an encoding of prompts."""
        return self._encode.seconds

    def decode_s(self, tokens: int) -> float:
        """Return the seconds from an image's last step to its answer, for an image of `tokens` tokens."""
        return self._decodes.seconds((1, tokens), tokens)


class _Table:
    """Means of shapes, and a line through them for other shapes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._means: OrderedDict[tuple[int, int], tuple[int, _Mean]] = OrderedDict()
        self._line: tuple[float, float] | None = None  # of the current means, once needed

    def add(self, shape: tuple[int, int], size: int, seconds: float) -> None:
        with self._lock:
            _, mean = self._means.setdefault(shape, (size, _Mean()))
            mean.add(seconds)
            self._means.move_to_end(shape)
            if len(self._means) > MAX_SHAPES:
                self._means.popitem(last=False)
            self._line = None

    def has(self, shape: tuple[int, int]) -> bool:
        with self._lock:
            return shape in self._means

    def seconds(self, shape: tuple[int, int], size: int) -> float:
        with self._lock:
            if found := self._means.get(shape):
                return found[1].seconds
            if self._line is None:
                self._line = _line([(size, mean.seconds) for size, mean in self._means.values()])
            start, slope = self._line
            return start + slope * size


class _Mean:
    """Moving average that a few slow samples hardly change."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._samples = 0

    def add(self, seconds: float) -> None:
        self._samples += 1
        if self._samples == 1:
            self.seconds = seconds
        elif self._samples <= SETTLED_AFTER:
            self.seconds = min(self.seconds, seconds)
        else:
            self.seconds += WEIGHT * (min(seconds, MAX_RATIO * self.seconds) - self.seconds)


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Return the line ``(start, slope)`` with the least squares of relative errors; neither is negative."""
    points = [(x, y) for x, y in points if y > 0]
    if not points:
        return 0.0, 0.0
    # Divided by y, the line is start / y + slope * x / y = 1.
    uu = sum(1 / y**2 for _, y in points)
    vv = sum((x / y) ** 2 for x, y in points)
    uv = sum(x / y**2 for x, y in points)
    u, v = sum(1 / y for _, y in points), sum(x / y for x, y in points)
    determinant = uu * vv - uv**2
    if determinant <= 1e-9 * uu * vv:  # one size only
        return 0.0, v / vv
    start, slope = (u * vv - v * uv) / determinant, (v * uu - u * uv) / determinant
    if start < 0:
        return 0.0, v / vv
    return (start, slope) if slope >= 0 else (u / uu, 0.0)
