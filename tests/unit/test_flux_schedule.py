"""Sigmas and timesteps: parity with FluxPipeline."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from genserve_backend.checkpoints import CheckpointError
from genserve_backend.flux.build import load_pipeline
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.schedule import Schedule, Scheduler
from genserve_backend.settings import FluxSettings
from random_flux import write_random_flux

SHIFTS = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
DEV = {"shift": 3.0, "use_dynamic_shifting": True, **SHIFTS}
SCHNELL = {"shift": 1.0, "use_dynamic_shifting": False, **SHIFTS}
CONFIGS: dict[str, dict[str, Any]] = {
    "dev": DEV,
    "schnell": SCHNELL,
    "other-shifts": {**DEV, "base_shift": 0.3, "max_shift": 2.0, "base_image_seq_len": 64, "max_image_seq_len": 512},
    "linear-shift": {**DEV, "time_shift_type": "linear"},
    "terminal": {**DEV, "shift_terminal": 0.02},
    "karras": {**SCHNELL, "use_karras_sigmas": True},
    "flow-sigmas": {"shift": 3.0, "use_flow_sigmas": True},
}


def reference(scheduler: FlowMatchEulerDiscreteScheduler, steps: int, tokens: int) -> Schedule:
    """Step 5 of FluxPipeline's ``__call__``."""
    config = scheduler.config
    sigmas = None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
    shifts = (config[name] for name in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"))
    timesteps, _ = retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas, mu=calculate_shift(tokens, *shifts))
    return Schedule(tuple(scheduler.sigmas.tolist()), tuple(timesteps.tolist()))


@pytest.mark.parametrize("tokens", [16, 64, 1_000, 4_096, 16_384])
@pytest.mark.parametrize("steps", [2, 4, 28, 100])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_schedule_equals_diffusers(config: dict[str, Any], steps: int, tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    plan = Scheduler(FlowMatchEulerDiscreteScheduler.from_config(config)).plan(steps, tokens)
    assert plan == reference(scheduler, steps, tokens)
    assert (len(plan.sigmas), len(plan.timesteps)) == (steps + 1, steps)
    assert plan.sigmas[-1] == 0
    assert all(sooner >= later for sooner, later in pairwise(plan.sigmas))


@pytest.mark.parametrize("config", [DEV, SCHNELL], ids=["dev", "schnell"])
def test_single_step_reaches_zero(config: dict[str, Any]) -> None:
    plan = Scheduler(FlowMatchEulerDiscreteScheduler(**config)).plan(1, 1_000)
    assert plan == Schedule(sigmas=(1.0, 0.0), timesteps=(1_000.0,))
    assert plan == reference(FlowMatchEulerDiscreteScheduler(**config), 1, 1_000)


@pytest.mark.parametrize("schnell", [False, True], ids=["dev", "schnell"])
def test_pipeline_uses_the_same_schedule(schnell: bool, tmp_path: Path) -> None:
    write_random_flux(tmp_path / "flux", schnell=schnell)
    checkpoint = FluxCheckpoint.load(tmp_path / "flux")
    pipeline = load_pipeline(checkpoint, FluxSettings(model_path=checkpoint.path), "cpu")
    pipeline.set_progress_bar_config(disable=True)
    plan = Scheduler(pipeline.scheduler).plan(5, 192 // 16 * 64 // 16)
    timesteps: list[float] = []

    def note(_: Any, __: int, timestep: torch.Tensor, ___: Any) -> dict[str, Any]:
        timesteps.append(timestep.item())
        return {}

    pipeline(
        "a cat",
        height=192,
        width=64,
        num_inference_steps=5,
        max_sequence_length=64,
        output_type="latent",
        callback_on_step_end=note,
    )
    assert plan.timesteps == tuple(timesteps)
    assert plan.sigmas == tuple(pipeline.scheduler.sigmas.tolist())


def test_dynamic_shift_depends_on_the_image_size() -> None:
    dev, schnell = (Scheduler(FlowMatchEulerDiscreteScheduler(**config)) for config in (DEV, SCHNELL))
    assert dev.plan(4, 4_096).sigmas[2] > dev.plan(4, 256).sigmas[2]
    assert schnell.plan(4, 4_096) == schnell.plan(4, 256)
    assert schnell.plan(4, 256).sigmas == (1.0, 0.75, 0.5, 0.25, 0.0)


def test_plans_are_independent() -> None:
    own = FlowMatchEulerDiscreteScheduler(**DEV)
    before = own.sigmas.clone()
    scheduler = Scheduler(own)
    first = scheduler.plan(4, 256)
    for steps in range(1, 101):
        for tokens in (64, 256, 1_024, 4_096):
            scheduler.plan(steps, tokens)
    assert scheduler.plan(4, 256) == first
    assert torch.equal(own.sigmas, before)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(**DEV, stochastic_sampling=True),
        FlowMatchHeunDiscreteScheduler(),
        EulerDiscreteScheduler(),
    ],
    ids=["stochastic", "heun", "not-flow-matching"],
)
def test_other_schedulers_are_rejected(scheduler: Any) -> None:
    with pytest.raises(CheckpointError, match="deterministic FlowMatchEulerDiscreteScheduler"):
        Scheduler(scheduler)
