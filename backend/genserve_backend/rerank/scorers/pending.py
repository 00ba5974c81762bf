"""The result of a forward that the device may still be working on."""

from __future__ import annotations

import torch


class Pending:
    """The outputs of a forward.

    Args:
        outputs: float32 ``[sequences, width]`` on the host, valid after `event`.
        event: Recorded on the device behind the copy of the outputs; None if they are there.
    """

    def __init__(self, outputs: torch.Tensor, event: torch.cuda.Event | None = None) -> None:
        self._outputs = outputs
        self._event = event

    @property
    def is_done(self) -> bool:
        """True if `outputs` will not wait."""
        return self._event is None

    def outputs(self) -> torch.Tensor:
        """Wait for the device, asleep, and return the outputs.

        Raises:
            Exception: The forward has failed; so far only its launch was known to have succeeded.
        """
        if self._event is not None:
            self._event.synchronize()
        return self._outputs
