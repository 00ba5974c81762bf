"""State of one image inside the engine, from its arrival to its answer."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from genserve_backend.flux.lora.cache import Combination
from genserve_backend.flux.prompts import Embedding, Prompt, adapted
from genserve_backend.flux.request import FluxRequest
from genserve_backend.flux.schedule import Schedule
from genserve_backend.flux.step_cache import Residual
from genserve_backend.worker.engine import Job
from genserve_backend.worker.scheduling import ProgressTimer


@dataclass(eq=False)
class ImageState:
    """A request in the engine. The engine's thread owns it until its last step, then the decoder's threads."""

    job: Job
    request: FluxRequest
    step: int = 0
    """Completed steps."""
    ran_at: int = 0
    """Engine tick of the last step, or of the arrival."""

    adapters: Combination | None = field(default=None, repr=False)
    """Set while an image with adapters is in flight: what it holds stays on the device."""

    # Set when the image gets its first slot.
    schedule: Schedule = field(init=False, repr=False)
    latents: torch.Tensor = field(init=False, repr=False)
    """Packed, ``[tokens, 64]`` in the model's dtype."""
    velocity: torch.Tensor | None = field(default=None, repr=False)
    """Transformer output of the last step, in the shape of `latents`."""
    prompt: Embedding = field(init=False, repr=False)
    negative: Embedding | None = field(default=None, repr=False)
    """Set only with true classifier-free guidance."""
    residuals: tuple[Residual | None, ...] = field(default=(), repr=False)
    """Per batch row, what a skipped step adds; empty before the first step and after the last one."""
    skipped_steps: int = 0
    """Steps in which the transformer's blocks did not run."""

    # For the answer, progress and metrics.
    started: float | None = None
    """Start of the first encoding of its prompt."""
    queue_s: float = 0.0
    encode_s: float = 0.0
    denoise_started: float = 0.0
    denoise_s: float = 0.0
    batch_sizes: int = 0
    """Sum of the batch sizes over the steps."""
    waited_s: float = 0.0
    """Seconds in the engine without a slot, including preemptions."""
    preempted: bool = False
    progress_timer: ProgressTimer = field(default_factory=lambda: ProgressTimer(last=time.monotonic()), repr=False)

    @property
    def level(self) -> int:
        """Priority level, 1 is the most urgent."""
        return self.job.level

    @property
    def arrived(self) -> float:
        """Arrival at the instance, on the clock of time.monotonic()."""
        return self.job.arrived

    @property
    def deadline(self) -> float:
        """Time at which the image fails if it is not answered, on the same clock."""
        return self.job.deadline

    @property
    def has_own_deadline(self) -> bool:
        """True if the caller asked for a shorter time than the server's limit."""
        return self.job.has_own_deadline

    @property
    def has_started(self) -> bool:
        """True once the image has had a slot."""
        return self.started is not None

    @property
    def has_slot(self) -> bool:
        """True while the image has a slot."""
        return self.has_started and not self.preempted

    @property
    def tokens(self) -> int:
        """Image tokens of one batch row."""
        return self.request.tokens

    @property
    def batch_rows(self) -> int:
        """Batch rows of a forward."""
        return self.request.batch_rows

    @property
    def cost(self) -> int:
        """Image tokens of a forward, over all batch rows."""
        return self.tokens * self.batch_rows

    @property
    def steps_left(self) -> int:
        """Steps until the image can be decoded."""
        return self.request.steps - self.step

    @property
    def prompts(self) -> list[Prompt]:
        """Prompts to encode: the image's, and its negative one with true classifier-free guidance."""
        texts = [self.request.prompt, self.request.negative_prompt] if self.request.guided else [self.request.prompt]
        return [adapted(text, self.adapters) for text in texts]

    @property
    def name(self) -> str:
        """Description for error messages."""
        return f"an image of {self.request.height} x {self.request.width} pixels"
