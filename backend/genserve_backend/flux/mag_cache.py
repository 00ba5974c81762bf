"""MagCache: the steps of an image that are skipped, from its number of steps and its threshold alone.

"MagCache: Fast Video Generation with Magnitude-Aware Cache" (Ma et al., 2025) observes that the residual of the blocks
shrinks from step to step by a ratio that hardly depends on prompt and seed. The product of the ratios since the last
computed step tells how wrong its residual has become. The decisions are those of diffusers' ``MagCacheConfig``, bit by
bit. Does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_SKIPPED = 3
"""Steps skipped in a row at most; diffusers' default of ``max_skip_steps``."""
RETENTION = 0.2
"""Share of the steps at the start that are never skipped; diffusers' default of ``retention_ratio``."""


def plan_skips(ratios: Sequence[float], steps: int, threshold: float) -> tuple[bool, ...]:
    """Return for each step of an image whether it is skipped.

    Args:
        ratios: The checkpoint's ratios, for any number of steps; see `interpolate`.
        steps: Denoising steps of the image.
        threshold: Limit on the accumulated error. 0 skips at most steps of ratio 1.
    """
    at_steps = interpolate(ratios, steps)
    first = int(RETENTION * steps + 0.5)
    # In float32 like diffusers: a float64 sum would decide otherwise on the border.
    one, limit = np.float32(1), np.float32(threshold)
    product, error, in_row = one, np.float32(0), 0
    skips = []
    for step in range(steps):
        skipped = False
        if step >= first:
            product = product * at_steps[step]
            error = error + abs(one - product)
            in_row += 1
            skipped = bool(step > 0 and error <= limit and in_row <= MAX_SKIPPED)
            if not skipped:
                product, error, in_row = one, np.float32(0), 0
        skips.append(skipped)
    return tuple(skips)


def interpolate(ratios: Sequence[float], steps: int) -> np.ndarray:
    """Return the ratios for another number of steps: those of the nearest point of the path, float32 ``[steps]``."""
    given = np.asarray(ratios, dtype=np.float32)
    if len(given) == steps:
        return given
    if steps == 1:
        return given[-1:]
    grid = np.arange(steps, dtype=np.float32) * np.float32((len(given) - 1) / (steps - 1))
    nearest: np.ndarray = given[np.round(grid).astype(np.int64)]
    return nearest
