"""Guidance: the transformer learns to give in one forward what classifier-free guidance gives in two.

FLUX.1-dev was distilled like this (Meng et al. 2023): the student sees the guidance scale, and its target is the
teacher's velocity without the caption plus the scale times the difference that the caption makes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional

from training.flow import NO_GUIDANCE, Batch, draw_batch, pick, predict, show, train_quickly
from training.latents import Bucket
from training.stage import Sitting, Stage
from training.text import TextParts

SHOWN_GUIDANCE = 3.5
"""The default of FLUX.1-dev."""


@dataclass(frozen=True)
class GuidancePlan:
    """How long and on what the guidance is distilled."""

    steps: int = 600
    tokens: int = 48 * 64
    rate: float = 3e-4
    native: float = 0.7
    most: float = 8.0
    """The largest guidance scale to learn."""
    unguided: float = 0.15
    """The share of pictures at the scale that changes nothing."""
    show: int = 250


def distill_guidance(
    sitting: Sitting, plan: GuidancePlan, text: TextParts, buckets: Sequence[Bucket], pipeline: FluxPipeline
) -> FluxTransformer2DModel:
    """Train a copy of `pipeline`'s transformer, or go on; returns the average of its last weights."""
    teacher = pipeline.transformer.to(sitting.device).eval()
    student = copy.deepcopy(teacher).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.0)
    stage = Stage("guidance", sitting, student, [optimizer], steps=plan.steps)
    train_quickly(teacher)
    train_quickly(student)
    for step in stage:
        batch = draw_batch(stage, text, pick(buckets, stage.rng, native=plan.native), plan.tokens, untold=0.0)
        guidance = _draw_guidance(plan, len(batch.captions), stage.generator).to(sitting.device)
        with torch.autocast(sitting.device.type, dtype=torch.bfloat16):
            target = _guided(teacher, text, batch, guidance)
            predicted = predict(student, batch, guidance=guidance)
        stage.optimize(functional.mse_loss(predicted.float(), target))
        if (step + 1) % plan.show == 0:
            show(stage, pipeline, guidance=SHOWN_GUIDANCE)
    return stage.averaged.module.eval()


def _draw_guidance(plan: GuidancePlan, count: int, generator: torch.Generator) -> Tensor:
    scales = NO_GUIDANCE + (plan.most - NO_GUIDANCE) * torch.rand(count, generator=generator)
    unguided = torch.rand(count, generator=generator) < plan.unguided
    return torch.where(unguided, NO_GUIDANCE, scales)


@torch.no_grad()
def _guided(teacher: FluxTransformer2DModel, text: TextParts, batch: Batch, guidance: Tensor) -> Tensor:
    """Classifier-free guidance by the teacher, in two forwards."""
    alone = torch.full_like(guidance, NO_GUIDANCE)
    pooled, tokens = text.encode([""] * len(batch.captions), length=batch.tokens.shape[1])
    told = predict(teacher, batch, guidance=alone).float()
    untold = predict(teacher, replace(batch, pooled=pooled, tokens=tokens), guidance=alone).float()
    return untold + guidance[:, None, None] * (told - untold)
