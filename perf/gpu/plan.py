"""The parts of each call, the most valuable ones first. Does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpu.variants import FLUX_VARIANTS, RERANK_VARIANTS, USUAL

MODELS = ("0.6B", "4B")
"""Sizes of Qwen3-Reranker that are measured by default."""


@dataclass(frozen=True)
class Part:
    """One process of a call."""

    name: str
    target: str
    """`module:function`; the function takes a `gpu.part.Run`."""
    limit_s: float
    """Maximum seconds."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The function's arguments."""


@dataclass(frozen=True)
class Choice:
    """The caller's choice of measurements."""

    variants: Sequence[str] = USUAL
    """Variants of the engine; the first one is measured in most detail."""
    models: Sequence[str] = MODELS
    tiny: bool = False


def truth(_: Choice) -> list[Part]:
    """Return the parts for errors, waits and memory."""
    return [
        Part("card", "gpu.card:card", 60, {"shapes": True}),
        Part("varlen", "gpu.varlen_errors:errors", 80),
        Part("images", "gpu.images_truth:images", 120),
        Part("waits", "gpu.waits:waits_and_memory", 120),
        Part("kernels", "gpu.kernels:kernels", 90),
        Part("scores", "gpu.waits:scores", 80),
    ]


def flux(choice: Choice) -> list[Part]:
    """Return the parts for FLUX's speed."""
    first, *others = choice.variants
    parts = [
        Part("card", "gpu.card:card", 40),
        Part(f"steps-{first}", "gpu.flux:steps", 160, {"variant": first}),
        Part(f"images-{first}", "gpu.flux:images", 150, {"variant": first, "beside": "diffusers"}),
        Part("codecs", "gpu.flux:codecs", 70),
    ]
    for variant in others:
        parts += [
            Part(f"steps-{variant}", "gpu.flux:steps", 160, {"variant": variant}),
            Part(f"images-{variant}", "gpu.flux:images", 120, {"variant": variant}),
        ]
    if "fp8" not in choice.variants:
        parts.append(Part("images-fp8", "gpu.flux:images", 100, {"variant": "fp8"}))
    return [*parts, Part("diffusers-compile", "gpu.flux:images", 150, {"beside": "diffusers-compile"})]


def rerank(choice: Choice) -> list[Part]:
    """Return the parts for the reranker's speed."""
    first, *others = choice.variants
    models = ("tiny",) if choice.tiny else tuple(choice.models)
    parts = [Part("card", "gpu.card:card", 40)]
    for variant in (first, *others):
        for model in models:
            named = {"variant": variant, "model": model}
            limit_s = 130
            parts += [
                Part(f"forwards-{model}-{variant}", "gpu.rerank:forwards", limit_s, named),
                Part(f"engine-{model}-{variant}", "gpu.rerank:engine", limit_s, {**named, "keep": variant == first}),
            ]
            if variant == first:
                parts.append(Part(f"padded-{model}", "gpu.rerank:padded", 100, {"model": model}))
    return parts


STAGES: dict[str, Callable[[Choice], list[Part]]] = {"truth": truth, "flux": flux, "rerank": rerank}
VARIANTS: dict[str, Sequence[str]] = {"truth": (), "flux": tuple(FLUX_VARIANTS), "rerank": tuple(RERANK_VARIANTS)}
