"""Skipped steps, for each batch row by itself: its blocks do not run, and it adds their last residual again.

A row is decided by its own image and threshold, whatever shares its forward. Its residual belongs to its image, so an
image may wait, move between batches, or run again after an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

from genserve_backend.flux.forward import Context, Forward, Rows, States
from genserve_backend.flux.mag_cache import plan_skips

PLANS_KEPT = 256


@dataclass(frozen=True)
class Residual:
    """Change that the blocks of a batch row made at its last computed step. Replaced, never modified.

    Its tensors have the model's dtype and hold no padding: two bytes times tokens times the transformer's width in
    bfloat16, 25 MB for an image of 1024 x 1024 pixels with FLUX.1-dev.
    """

    blocks: torch.Tensor
    """Output of the blocks that can be skipped minus their input, ``[tokens, D]``."""
    first_block: torch.Tensor | None = None
    """Output of the first block minus its input, ``[tokens, D]``; only for the first-block cache."""


@dataclass(frozen=True)
class CachedRow:
    """A batch row before a forward."""

    threshold: float
    """Limit on the error of a skipped step; 0 computes every step."""
    step: int
    steps: int
    tokens: int
    """Image tokens without padding."""
    residual: Residual | None
    """None before its first computed step, and without a threshold."""


@dataclass(frozen=True)
class BlocksOutput:
    """Output of the blocks for all rows of a batch."""

    image: torch.Tensor
    """``[B, S, D]``."""
    residuals: Sequence[Residual | None]
    """Per row, to be kept for its next step."""
    skipped: Sequence[bool]
    """Per row."""


class StepCache(Protocol):
    """A method of skipping steps."""

    def run(self, forward: Forward, states: States, context: Context, rows: Sequence[CachedRow]) -> BlocksOutput:
        """Run the blocks for the rows that need them.

        Args:
            forward: The blocks.
            states: Input of the first block. It stays unchanged.
            context: Further inputs of the blocks.
            rows: The rows of the batch.
        """


class NoCache:
    """No step is skipped."""

    def run(self, forward: Forward, states: States, context: Context, rows: Sequence[CachedRow]) -> BlocksOutput:
        """Run all blocks for all rows."""
        everything = Rows(range(len(rows)), len(rows), states.image.device)
        image = forward.run_blocks(states, context, everything).image
        return BlocksOutput(image, [None] * len(rows), [False] * len(rows))


class MagCache:
    """Skips by the checkpoint's ratios, see `flux.mag_cache`. Decides on the host, without the device.

    Args:
        ratios: The checkpoint's ratios.
    """

    def __init__(self, ratios: Sequence[float]) -> None:
        self._plan = lru_cache(PLANS_KEPT)(lambda steps, threshold: plan_skips(ratios, steps, threshold))

    def run(self, forward: Forward, states: States, context: Context, rows: Sequence[CachedRow]) -> BlocksOutput:
        """Run all blocks for the rows whose plan has the step computed."""
        skipped = [row.residual is not None and self._plan(row.steps, row.threshold)[row.step] for row in rows]
        return _run_rest(forward, states, context, rows, skipped, first=0)


class FirstBlockCache:
    """Skips while the residual of the first block changes little, as diffusers' ``FirstBlockCacheConfig`` decides.

    The first block runs for every row in every step. The change is measured against the last computed step: the mean
    absolute difference over the mean absolute value. The host has to wait for it, once per forward and for all rows
    together, and the device idles until the next blocks are queued.
    """

    def run(self, forward: Forward, states: States, context: Context, rows: Sequence[CachedRow]) -> BlocksOutput:
        """Run the first block for all rows, and the others for the rows that have changed."""
        everything = Rows(range(len(rows)), len(rows), states.image.device)
        after = forward.run_blocks(states, context, everything, end=1)
        firsts = [
            _difference(after.image, states.image, number, row.tokens) if row.threshold else None
            for number, row in enumerate(rows)
        ]
        skipped = _barely_changed(rows, firsts)
        return _run_rest(forward, after, context, rows, skipped, first=1, first_blocks=firsts)


def _barely_changed(rows: Sequence[CachedRow], firsts: Sequence[torch.Tensor | None]) -> list[bool]:
    """Return for each row whether its first block's residual is within its threshold of the last computed one."""
    before = [row.residual.first_block if row.residual else None for row in rows]
    changes = {
        number: (now - last).abs().mean(dtype=torch.float32) / last.abs().mean(dtype=torch.float32)
        for number, (now, last) in enumerate(zip(firsts, before, strict=True))
        if now is not None and last is not None
    }
    if not changes:
        return [False] * len(rows)
    found = dict(zip(changes, torch.stack(list(changes.values())).tolist(), strict=True))
    # NaN is not within any threshold: such a row is computed, and fails by itself.
    return [number in found and found[number] <= row.threshold for number, row in enumerate(rows)]


def _run_rest(
    forward: Forward,
    states: States,
    context: Context,
    rows: Sequence[CachedRow],
    skipped: Sequence[bool],
    *,
    first: int,
    first_blocks: Sequence[torch.Tensor | None] | None = None,
) -> BlocksOutput:
    """Run the blocks from `first` for the rows that are not skipped, and add the residuals of the others."""
    residuals = [row.residual for row in rows]
    computed = [number for number, skip in enumerate(skipped) if not skip]
    image = states.image
    if computed:
        chosen = Rows(computed, len(rows), image.device)
        output = forward.run_blocks(states, context, chosen, first=first).image
        for position, number in enumerate(computed):
            if rows[number].threshold:
                tokens = rows[number].tokens
                # One tensor per row: a view of the batch's would keep all of it in memory.
                residuals[number] = Residual(
                    output[position, :tokens] - image[number, :tokens], first_blocks[number] if first_blocks else None
                )
        if chosen.index is None:
            return BlocksOutput(output, residuals, skipped)
        image = image.index_copy(0, chosen.index, output)
    else:
        image = image.clone()
    for number, (row, skip) in enumerate(zip(rows, skipped, strict=True)):
        if skip and row.residual:
            image[number, : row.tokens] += row.residual.blocks
    return BlocksOutput(image, residuals, skipped)


def _difference(after: torch.Tensor, before: torch.Tensor, number: int, tokens: int) -> torch.Tensor:
    return after[number, :tokens] - before[number, :tokens]
