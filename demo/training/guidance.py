"""Guidance distillation: one forward with the result of the two forwards of classifier-free guidance.

FLUX.1-dev was distilled like this (Meng et al. 2023): the student gets the guidance scale, and its target is the
teacher's velocity without the caption plus the scale times the difference between with and without.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional

from training.flow import NO_GUIDANCE, Batch, draw_batch, pick, predict, show, use_engine_attention
from training.latents import Bucket
from training.stage import Session, Stage
from training.text import TextParts

SHOWN_GUIDANCE = 3.5
"""The default of FLUX.1-dev."""


@dataclass(frozen=True)
class GuidancePlan:
    """Steps and data of the distillation."""

    steps: int = 600
    tokens: int = 48 * 64
    rate: float = 3e-4
    native: float = 0.7
    most: float = 8.0
    """Largest guidance scale."""
    unguided: float = 0.15
    """Share of pictures at the scale without effect."""
    show: int = 250


def distill_guidance(
    session: Session, plan: GuidancePlan, text: TextParts, buckets: Sequence[Bucket], pipeline: FluxPipeline
) -> FluxTransformer2DModel:
    """Train a copy of `pipeline`'s transformer, or resume; return the average of its last weights."""
    teacher = pipeline.transformer.to(session.device).eval()
    student = copy.deepcopy(teacher).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.0)
    stage = Stage("guidance", session, student, [optimizer], steps=plan.steps)
    use_engine_attention(teacher)
    use_engine_attention(student)
    for step in stage:
        batch = draw_batch(stage, text, pick(buckets, stage.rng, native=plan.native), plan.tokens, no_caption=0.0)
        guidance = _draw_guidance(plan, len(batch.captions), stage.generator).to(session.device)
        with torch.autocast(session.device.type, dtype=torch.bfloat16):
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
    """Return the teacher's velocity with classifier-free guidance, in two forwards."""
    alone = torch.full_like(guidance, NO_GUIDANCE)
    pooled, tokens = text.encode([""] * len(batch.captions), length=batch.tokens.shape[1])
    conditional = predict(teacher, batch, guidance=alone).float()
    unconditional = predict(teacher, replace(batch, pooled=pooled, tokens=tokens), guidance=alone).float()
    return unconditional + guidance[:, None, None] * (conditional - unconditional)
