"""Costs: the time that work takes on the device, as measured so far."""

from __future__ import annotations


class MeasuredCosts:
    """Estimates from the engine's own forwards and decodings."""

    def __init__(self) -> None:
        self._steps: dict[tuple[int, int], float] = {}

    @property
    def are_known(self) -> bool:
        """True once enough was measured for the estimates to be relied on."""
        return False

    def step_s(self, batch_rows: int, tokens: int) -> float:
        """Return the seconds of a forward of `batch_rows` rows with `tokens` image tokens each."""
        return 0.0

    def decode_s(self, tokens: int) -> float:
        """Return the seconds from an image's last step to its answer, for an image of `tokens` tokens."""
        return 0.0
