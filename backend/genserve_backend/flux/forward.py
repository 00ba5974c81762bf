"""The transformer's forward in parts: embedders, blocks and head.

Together they are the forward of diffusers' ``FluxTransformer2DModel``: the same operators in the same order. Apart,
they let the blocks run for some rows of a batch, and the embedders and the head for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

import torch
from diffusers import FluxTransformer2DModel

from genserve_backend.devices import move
from genserve_backend.flux.lora.adapters import Adapters
from genserve_backend.flux.lora.cache import Combination


class Rows:
    """Rows of a batch.

    Args:
        numbers: Row numbers in ascending order, at least one.
        batch_rows: Number of rows of the batch.
        device: The batch's device.
    """

    def __init__(self, numbers: Sequence[int], batch_rows: int, device: torch.device) -> None:
        self.numbers = tuple(numbers)
        self.index = None if len(numbers) == batch_rows else move(torch.tensor(self.numbers), device)
        """The numbers on the device, int64 ``[R]``; None for all rows."""

    def select(self, per_row: torch.Tensor) -> torch.Tensor:
        """Return these rows of ``[B, ...]``; all of them without a copy."""
        return per_row if self.index is None else per_row[self.index]


@dataclass(frozen=True)
class States:
    """Hidden states between two blocks."""

    image: torch.Tensor
    """``[B, S, D]``."""
    text: torch.Tensor
    """``[B, T, D]``."""


@dataclass(frozen=True)
class Context:
    """Inputs that are the same for every block."""

    conditioning: torch.Tensor
    """Embedding of timestep, guidance and pooled prompt, ``[B, D]``."""
    rotation: torch.Tensor
    """``[B or 1, T + S, 1, ...]``, see `flux.attention`."""
    mask: torch.Tensor | None
    """Bool ``[B, 1, 1, T + S]``, false for padding; None without padding."""
    adapters: Sequence[Combination | None]
    """Adapters of each row."""


class Forward:
    """The parts of a forward.

    Args:
        transformer: Its blocks are called as they are, so they may be compiled, quantized or adapted in place.
        adapters: Adapters of the transformer, if any are served.
    """

    def __init__(self, transformer: FluxTransformer2DModel, adapters: Adapters | None = None) -> None:
        self._transformer = transformer
        self._adapters = adapters

    def select_adapters(self, combinations: Sequence[Combination | None]) -> None:
        """Give the rows of a batch their adapters, before any other part of its forward."""
        if self._adapters:
            self._adapters.select(combinations)

    def embed_image(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the hidden states of latents, ``[B, S, 64]`` to ``[B, S, D]``."""
        states: torch.Tensor = self._transformer.x_embedder(latents)
        return states

    def embed_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the hidden states of T5's output, ``[B, T, joint_attention_dim]`` to ``[B, T, D]``."""
        states: torch.Tensor = self._transformer.context_embedder(tokens)
        return states

    def embed_conditioning(
        self, timesteps: torch.Tensor, guidance: torch.Tensor | None, pooled: torch.Tensor
    ) -> torch.Tensor:
        """Return the conditioning of every block and of the head, ``[B, D]``.

        Args:
            timesteps: 0 to 1, ``[B]`` in the model's dtype.
            guidance: Scales, ``[B]``; None for a checkpoint without guidance embeddings.
            pooled: CLIP's output, ``[B, pooled_projection_dim]``.
        """
        dtype = timesteps.dtype
        scales = [timesteps * 1000] if guidance is None else [timesteps * 1000, guidance.to(dtype) * 1000]
        conditioning: torch.Tensor = self._transformer.time_text_embed(*scales, pooled)
        return conditioning

    def run_blocks(
        self, states: States, context: Context, rows: Rows, *, first: int = 0, end: int | None = None
    ) -> States:
        """Run the blocks `first` to `end` for some rows of a batch. All blocks of all forwards run here.

        Args:
            states: Input of block `first`, with all rows of the batch.
            context: With all rows of the batch.
            rows: The rows to run.
            first: Number of the first block; double blocks come before single blocks.
            end: Number of the block to stop before; None runs all that are left.

        Returns:
            The output of the last of them, for `rows` only.
        """
        if rows.index is not None:
            self.select_adapters([context.adapters[number] for number in rows.numbers])
        image, text = rows.select(states.image), rows.select(states.text)
        conditioning = rows.select(context.conditioning)
        rotation = context.rotation if len(context.rotation) == 1 else rows.select(context.rotation)
        mask = None if context.mask is None else rows.select(context.mask)
        transformer = self._transformer
        for block in islice(chain(transformer.transformer_blocks, transformer.single_transformer_blocks), first, end):
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                temb=conditioning,
                image_rotary_emb=None,  # the attention takes `rotation` instead
                joint_attention_kwargs={"rotation": rotation, "attention_mask": mask},
            )
        if rows.index is not None:
            self.select_adapters(context.adapters)  # for the head
        return States(image, text)

    def head(self, image: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """Return the velocities, ``[B, S, D]`` to ``[B, S, 64]``."""
        velocities: torch.Tensor = self._transformer.proj_out(self._transformer.norm_out(image, conditioning))
        return velocities
