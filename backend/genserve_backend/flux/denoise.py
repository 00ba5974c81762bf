"""Denoising: one step for a batch of images, each at its own step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from diffusers import FluxPipeline
from torch.nn.utils.rnn import pad_sequence

from genserve_backend.devices import copy_together, move, record_event
from genserve_backend.flux.attention import RaggedAttention, complex_rotation, real_rotation
from genserve_backend.flux.forward import Context, Forward, States
from genserve_backend.flux.lora.adapters import Adapters
from genserve_backend.flux.lora.cache import Combination
from genserve_backend.flux.schedule import SCHEDULES_KEPT, Schedule
from genserve_backend.flux.state import ImageState
from genserve_backend.flux.step_cache import BlocksOutput, CachedRow, NoCache, Residual, StepCache

ROTATIONS_KEPT = 64


class Stepped(NamedTuple):
    """An image after a step. Nothing of it is kept until the image takes it over."""

    latents: torch.Tensor
    """``[tokens, 64]``."""
    velocity: torch.Tensor
    """``[tokens, 64]``."""
    residuals: tuple[Residual | None, ...] = ()
    """Per batch row of the image, for its next step."""
    skipped: bool = False
    """True if the blocks ran for none of its rows."""


class Denoiser:
    """The transformer for batches that change from step to step.

    Args:
        pipeline: The pipeline with the transformer, whose attention is replaced.
        max_sequence_length: T5 tokens of each prompt.
        real_rotations: Whether a CPU, too, has rotations without complex numbers, as compiled blocks need.
        adapters: Adapters of the transformer, if any are served.
        step_cache: Method of skipping steps; none by default.
    """

    def __init__(
        self,
        pipeline: FluxPipeline,
        *,
        max_sequence_length: int,
        real_rotations: bool = False,
        adapters: Adapters | None = None,
        step_cache: StepCache | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._transformer = pipeline.transformer
        self._transformer.set_attn_processor(RaggedAttention())
        # These properties of the transformer go through all its weights, which takes milliseconds.
        self.device: torch.device = self._transformer.device
        self.dtype: torch.dtype = self._transformer.dtype
        self._forward = Forward(self._transformer, adapters)
        self._no_cache = NoCache()
        self._step_cache = step_cache or self._no_cache
        self._text_length = max_sequence_length
        self._guidance_embeds = bool(self._transformer.config.guidance_embeds)
        is_complex = self.device.type == "cpu" and not real_rotations
        self._rotation_from = complex_rotation if is_complex else real_rotation
        self._rotation = lru_cache(ROTATIONS_KEPT)(self._make_rotation)
        self._plan = lru_cache(SCHEDULES_KEPT)(self._make_plan)
        self._batch: Batch | None = None
        self._queued: torch.cuda.Event | None = None

    def noise(self, image: ImageState) -> torch.Tensor:
        """Return the initial latents of an image, packed ``[tokens, 64]``: those of FluxPipeline for the same seed.

        The noise is drawn on the CPU for every device, so that a seed gives the same image everywhere.
        """
        latents, _ = self._pipeline.prepare_latents(
            1,
            self._transformer.config.in_channels // 4,
            image.request.height,
            image.request.width,
            self.dtype,
            torch.device("cpu"),
            torch.Generator("cpu").manual_seed(image.request.seed),
        )
        return move(latents[0], self.device)

    def step(self, images: Sequence[ImageState]) -> list[Stepped]:
        """Return each image after its next step. The images stay unchanged."""
        batch = self._batch
        if batch is None or not batch.matches(images):
            self._batch = None  # free its memory before the next one is made
            batch = Batch(
                images,
                self.device,
                rotations=[self._rotation(*size) for size in map(_grid, images)],
                plans=[self._plan(image.schedule) for image in images],
            )
        velocities, blocks = self._velocities(batch)
        latents = batch.advance(velocities)
        self._batch = batch
        self._keep_pace()
        return batch.cut(latents, velocities, blocks)

    def _keep_pace(self) -> None:
        """Wait for the previous step.

        A GPU queues work without a limit, and newcomers and cancellations would wait for all of it. One step ahead is
        enough to keep it busy.
        """
        previous, self._queued = self._queued, record_event(self.device)
        if previous:
            previous.synchronize()

    def _velocities(self, batch: Batch) -> tuple[torch.Tensor, BlocksOutput]:
        """Return the velocities with guidance applied, ``[images, tokens, 64]``, and the blocks' output."""
        forward = self._forward
        forward.select_adapters(batch.adapters)
        image = forward.embed_image(batch.expand(batch.latents))
        conditioning = forward.embed_conditioning(
            batch.expand(batch.timesteps().to(self.dtype) / 1000),
            batch.expand(batch.guidance) if self._guidance_embeds else None,
            batch.pooled,
        )
        states = States(image, forward.embed_text(batch.text))
        context = Context(conditioning, batch.rotation, batch.mask, batch.adapters)
        rows = batch.rows()
        cache = self._step_cache if any(row.threshold for row in rows) else self._no_cache
        output = cache.run(forward, states, context, rows)
        return batch.guide(forward.head(output.image, conditioning)), output

    def _make_plan(self, schedule: Schedule) -> torch.Tensor:
        """Return a schedule on the device: float32 ``[steps + 1, 2]``, sigma and timestep; the last timestep unused."""
        return move(torch.tensor([schedule.sigmas, (*schedule.timesteps, 0.0)]).T.contiguous(), self.device)

    def _make_rotation(self, height: int, width: int) -> torch.Tensor:
        """Return the rotation of a grid of image tokens and the text before it, ``[text + height * width, ...]``."""
        # On the CPU: the copies that diffusers makes to a GPU would wait for the current step.
        ids = self._pipeline._prepare_latent_image_ids(1, height, width, torch.device("cpu"), self.dtype)
        text_ids = torch.zeros(self._text_length, 3, dtype=self.dtype)
        return move(self._rotation_from(*self._transformer.pos_embed(torch.cat((text_ids, ids)))), self.device)


class Batch:
    """The inputs of a forward, kept from step to step while the batch holds the same images.

    First one batch row per image, then another one per image with true classifier-free guidance. If sizes differ, image
    tokens are padded at the end and masked. Nothing here waits for the device: schedules are looked up on it.

    Args:
        images: At least one.
        device: The transformer's device.
        rotations: Rotation per image.
        plans: Schedule per image, on the device, float32 ``[steps + 1, 2]``.
    """

    def __init__(
        self,
        images: Sequence[ImageState],
        device: torch.device,
        *,
        rotations: Sequence[torch.Tensor],
        plans: Sequence[torch.Tensor],
    ) -> None:
        self._images = list(images)
        self._steps = [image.step for image in images]
        self._tokens = [image.tokens for image in images]
        self._device = device
        guided = [index for index, image in enumerate(images) if image.negative]
        self._rows_of_images: list[tuple[int, ...]] = [(index,) for index in range(len(images))]
        for row, index in enumerate(guided, start=len(images)):
            self._rows_of_images[index] += (row,)
        starts = [0, *accumulate(map(len, plans))]
        at = [start + image.step for start, image in zip(starts, images, strict=False)]
        self._image_of_row, self._guided, self._at = copy_together([[*range(len(images)), *guided], guided, at], device)
        self._plan = torch.cat(list(plans))
        embeddings = [image.prompt for image in images] + [image.negative for image in images if image.negative]
        self.text = torch.stack([embedding.tokens for embedding in embeddings])
        self.pooled = torch.stack([embedding.pooled for embedding in embeddings])
        self.guidance = self._column([image.request.guidance for image in images])
        self._true_cfg = self._column([images[index].request.true_cfg_scale for index in guided])
        self.latents = pad_sequence([image.latents for image in images], batch_first=True)
        self.rotation, self.mask = self._positions(rotations)

    @property
    def adapters(self) -> list[Combination | None]:
        """Adapters of each batch row. The images hold them, so that an image that ends frees them."""
        return [image.adapters for image in self._images] + [image.adapters for image in self._images if image.negative]

    def matches(self, images: Sequence[ImageState]) -> bool:
        """Return whether a new batch for `images` would be the same."""
        return len(images) == len(self._images) and all(
            image is mine and image.step == step
            for image, mine, step in zip(images, self._images, self._steps, strict=True)
        )

    def expand(self, per_image: torch.Tensor) -> torch.Tensor:
        """Expand ``[images, ...]`` to ``[batch rows, ...]``."""
        return per_image[self._image_of_row] if len(self._guided) else per_image

    def timesteps(self) -> torch.Tensor:
        """Return the current timesteps, float32 ``[images]``."""
        return self._plan[self._at, 1]

    def guide(self, velocities: torch.Tensor) -> torch.Tensor:
        """Apply true classifier-free guidance like FluxPipeline, in the model's dtype.

        Args:
            velocities: ``[batch rows, tokens, 64]``.

        Returns:
            ``[images, tokens, 64]``.
        """
        if not len(self._guided):
            return velocities
        images, negative = velocities[: len(self._images)], velocities[len(self._images) :]
        scale = self._true_cfg[:, None, None]
        difference = images[self._guided] - negative
        return images.index_copy(0, self._guided, negative + (scale * difference.float()).to(negative.dtype))

    def advance(self, velocities: torch.Tensor) -> torch.Tensor:
        """Take one Euler step, in float32 like the scheduler, and return the new latents."""
        width = self._plan[self._at + 1, 0] - self._plan[self._at, 0]
        change = (width[:, None, None] * velocities.float()).to(velocities.dtype)
        self.latents = (self.latents.float() + change).to(velocities.dtype)
        self._at = self._at + 1
        self._steps = [step + 1 for step in self._steps]
        return self.latents

    def rows(self) -> list[CachedRow]:
        """Return the batch rows before the next forward."""
        rows: dict[int, CachedRow] = {}
        for image, numbers in zip(self._images, self._rows_of_images, strict=True):
            residuals = image.residuals or (None,) * len(numbers)
            for number, residual in zip(numbers, residuals, strict=True):
                rows[number] = CachedRow(image.request.cache, image.step, image.request.steps, image.tokens, residual)
        return [rows[number] for number in range(len(rows))]

    def cut(self, latents: torch.Tensor, velocities: torch.Tensor, blocks: BlocksOutput) -> list[Stepped]:
        """Return each image's part of a step, as views without padding."""
        return [
            Stepped(
                latents[index, :tokens],
                velocities[index, :tokens],
                tuple(blocks.residuals[row] for row in rows),
                all(blocks.skipped[row] for row in rows),
            )
            for index, (tokens, rows) in enumerate(zip(self._tokens, self._rows_of_images, strict=True))
        ]

    def _column(self, values: Sequence[float]) -> torch.Tensor:
        return move(torch.tensor(values, dtype=torch.float32), self._device)

    def _positions(self, rotations: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the rotations, ``[batch rows or 1, T + S, 1, ...]``, and a mask if lengths differ."""
        if all(rotation is rotations[0] for rotation in rotations):
            return rotations[0][None, :, None], None
        rotation = self.expand(pad_sequence(list(rotations), batch_first=True))[:, :, None]
        lengths = self.expand(move(torch.tensor([len(each) for each in rotations]), self._device))
        mask = torch.arange(rotation.shape[1], device=self._device) < lengths[:, None]
        return rotation, mask[:, None, None]


def _grid(image: ImageState) -> tuple[int, int]:
    """Return the height and width in image tokens."""
    return image.request.height // 16, image.request.width // 16
