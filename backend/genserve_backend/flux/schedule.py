"""Denoising schedules: the sigmas and timesteps of an image's steps, as FluxPipeline sets them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from genserve_backend.checkpoints import CheckpointError

SCHEDULES_KEPT = 256


@dataclass(frozen=True)
class Schedule:
    """The steps of one image."""

    sigmas: tuple[float, ...]
    """Noise levels from 1 down to 0, one more than there are steps; float32 values."""
    timesteps: tuple[float, ...]
    """Transformer input of each step, 0 to 1000; float32 values."""


class Scheduler:
    """The checkpoint's scheduler, without its per-image state.

    Args:
        scheduler: The checkpoint's scheduler.

    Raises:
        CheckpointError: The scheduler does not take plain Euler steps.
    """

    def __init__(self, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.stochastic_sampling:
            raise CheckpointError("the scheduler is not a deterministic FlowMatchEulerDiscreteScheduler")
        self._config = dict(scheduler.config)
        self.plan = lru_cache(SCHEDULES_KEPT)(self._plan)

    def _plan(self, steps: int, tokens: int) -> Schedule:
        """Return the schedule for `steps` steps of an image with `tokens` image tokens.

        More tokens shift the sigmas towards more noise: see `calculate_shift`, and section 5.3.2 of "Scaling
        Rectified Flow Transformers for High-Resolution Image Synthesis" (Esser et al., 2024).
        """
        config: Any = self._config
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        shift = calculate_shift(
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas = None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(steps if sigmas is None else None, sigmas=sigmas, mu=shift)
        return Schedule(tuple(scheduler.sigmas.tolist()), tuple(scheduler.timesteps.tolist()))
