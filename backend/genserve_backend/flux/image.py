"""One image in the making: what a pipeline call would keep in its local variables."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from genserve_backend.flux.prompts import Embedding
from genserve_backend.flux.request import FluxRequest
from genserve_backend.flux.schedule import Schedule
from genserve_backend.worker.engine import Job


@dataclass(eq=False)
class Image:
    """From its arrival to its decoding. The engine's thread owns it, then the decoder's."""

    job: Job
    request: FluxRequest
    step: int = 0
    """Steps that are done."""
    ran_at: int = 0
    """The engine's tick of its last step, or of its arrival."""

    # Filled when it is first run.
    schedule: Schedule = field(init=False, repr=False)
    latents: torch.Tensor = field(init=False, repr=False)
    """Packed, ``[tokens, 64]`` in the model's dtype."""
    velocity: torch.Tensor | None = field(default=None, repr=False)
    """What the transformer said at the last step, same shape."""
    prompt: Embedding = field(init=False, repr=False)
    negative: Embedding | None = field(default=None, repr=False)
    """Where it takes true classifier-free guidance."""

    # What its answer and the operator want to know.
    started: float | None = None
    queue_s: float = 0.0
    encode_s: float = 0.0
    denoise_started: float = 0.0
    denoise_s: float = 0.0
    batch_sizes: int = 0
    """Sum over its steps."""
    waited_s: float = 0.0
    """Seconds in the engine without a place to run, pauses included."""
    paused: bool = False
    reported: float = field(default_factory=time.monotonic)

    @property
    def level(self) -> int:
        """Its priority level, 1 the most urgent."""
        return self.job.submit.level

    @property
    def arrived(self) -> float:
        """On the clock of time.monotonic()."""
        return self.job.arrived

    @property
    def has_started(self) -> bool:
        """Whether it has had a place to run."""
        return self.started is not None

    @property
    def has_place(self) -> bool:
        """Whether it has one now."""
        return self.has_started and not self.paused

    @property
    def tokens(self) -> int:
        """Image tokens of one row."""
        return self.request.tokens

    @property
    def rows(self) -> int:
        """Rows of a forward that it takes."""
        return self.request.rows

    @property
    def cost(self) -> int:
        """Image tokens of a forward that it takes."""
        return self.tokens * self.rows

    @property
    def steps_left(self) -> int:
        """Steps until it can be decoded."""
        return self.request.steps - self.step

    @property
    def texts(self) -> list[str]:
        """What has to be encoded for it."""
        return [self.request.prompt, self.request.negative_prompt] if self.request.guided else [self.request.prompt]

    @property
    def name(self) -> str:
        """For errors."""
        return f"an image of {self.request.height} x {self.request.width} pixels"
