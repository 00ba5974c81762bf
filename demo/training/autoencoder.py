"""The autoencoder: pictures to latents with 16 channels at an eighth of their size, and back."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.nn import functional

from shapes.drawing import draw_picture
from shapes.scenes import Style, draw_scene
from training.stage import Session, Stage

NATIVE_SIZE = 128
_NEON = 0.12
"""Share of neon pictures: the LoRA's style passes through the autoencoder too."""
_POOL_SIZES = (64, 64, 128, 128, 128, 192)


@dataclass(frozen=True)
class AutoencoderPlan:
    """Steps and data of the autoencoder's training.

    Small crops teach the colours at a quarter of the cost, larger ones the edges. Whole pictures come last, because
    the group norms have to be trained with them.
    """

    steps: int = 6000
    crops: tuple[tuple[float, int, int], ...] = ((0.0, 32, 32), (0.5, 64, 16), (0.8, NATIVE_SIZE, 4))
    """Share of the steps from which it applies, side of the crop in pixels, and batch size."""
    pool: int = 5000
    """Number of pictures to crop."""
    rate: float = 5e-4
    edges: float = 1.0
    """Weight of the loss on differences of neighbouring pixels, which keeps edges sharp."""
    prior: float = 5e-4
    """Weight of the latents' divergence from a normal distribution."""

    def crop(self, step: int) -> tuple[int, int]:
        """Return the side of the crops and the batch size at a step."""
        return max(each for each in self.crops if each[0] * self.steps <= step)[1:]


def new_autoencoder() -> AutoencoderKL:
    """Return an autoencoder with random weights.

    It has no attention in the middle: each part of the picture depends only on its surroundings, so every size works
    after training on one. Each norm has one group: more groups remove the level of each group, which is the only
    content of plain areas. With eight groups, colours took many more steps to learn.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 96, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=1,
        sample_size=NATIVE_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)


def train_autoencoder(session: Session, plan: AutoencoderPlan) -> AutoencoderKL:
    """Train an autoencoder, or resume; return the average of its last weights."""
    model = new_autoencoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.rate, betas=(0.9, 0.99), weight_decay=1e-4)
    stage = Stage("autoencoder", session, model, [optimizer], steps=plan.steps)
    pool = _draw_pool(plan.pool, session.seed) if stage.step < plan.steps else []
    for step in stage:
        side, count = plan.crop(step)
        pixels = _batch(pool, stage.rng, side=side, count=count).to(session.device)
        with torch.autocast(session.device.type, dtype=torch.bfloat16):
            posterior = model.encode(pixels).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=stage.generator).to(session.device)
            restored = model.decode(posterior.mean + posterior.std * noise).sample
        restored = restored.float()
        distance = functional.l1_loss(restored, pixels)
        down, across = (functional.l1_loss(restored.diff(dim=dim), pixels.diff(dim=dim)) for dim in (2, 3))
        edges = down + across
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        prior = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        stage.optimize(distance + plan.edges * edges + plan.prior * prior, distance=distance, edges=edges, prior=prior)
        if (step + 1) % 250 == 0:
            _show(stage, pixels, restored)
    return stage.averaged.module.eval()


def to_pixels(pictures: list[Image.Image] | list[np.ndarray]) -> Tensor:
    """Return pictures as a tensor ``[count, 3, height, width]`` between -1 and 1."""
    array = np.stack([np.asarray(picture) for picture in pictures])
    return (torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(
        memory_format=torch.channels_last
    )


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Return the pictures of a tensor, the inverse of `to_pixels`; values are clamped."""
    array = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture.numpy()) for picture in array.permute(0, 2, 3, 1)]


def _draw_pool(count: int, seed: int) -> list[np.ndarray]:
    pool = []
    for index in range(count):
        rng = random.Random(f"{seed} autoencoder {index}")
        style: Style = "neon" if rng.random() < _NEON else "plain"
        size = _POOL_SIZES[index % len(_POOL_SIZES)]
        scene = draw_scene(rng, held_out=False, style=style)
        pool.append(np.asarray(draw_picture(scene, width=size, height=size, rng=rng, style=style)))
    return pool


def _batch(pool: list[np.ndarray], rng: random.Random, *, side: int, count: int) -> Tensor:
    crops = []
    for picture in rng.sample([picture for picture in pool if len(picture) >= side], count):
        top, left = (rng.randrange(length - side + 1) for length in picture.shape[:2])
        crops.append(picture[top : top + side, left : left + side])
    return to_pixels(crops)


def _show(stage: Stage, pixels: Tensor, restored: Tensor) -> None:
    """Write originals above their reconstructions."""
    pairs = zip(to_pictures(pixels[:8]), to_pictures(restored[:8]), strict=True)
    width, height = pixels.shape[3], pixels.shape[2]
    picture = Image.new("RGB", (width * min(8, len(pixels)), 2 * height))
    for column, pair in enumerate(pairs):
        for row, each in enumerate(pair):
            picture.paste(each, (column * width, row * height))
    folder = stage.folder / "samples"
    folder.mkdir(exist_ok=True)
    picture.save(folder / f"{stage.step + 1:06}.png")
