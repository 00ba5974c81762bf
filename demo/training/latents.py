"""Pictures as latents: encoded once, packed into tokens, cached in files."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor
from tqdm import tqdm

from shapes.drawing import draw_picture
from shapes.scenes import Scene, Style, draw_scene
from training.autoencoder import NATIVE_SIZE, to_pixels
from training.stage import Session

PATCH = 16
"""Pixels of a token's side: eight per latent, two latents per token."""
Size = tuple[int, int]
"""Width and height in pixels."""

_ENCODED_AT_ONCE = 16 * NATIVE_SIZE**2
_MEASURED = 200


@dataclass(frozen=True)
class Bucket:
    """Scenes of one size and their latents."""

    size: Size
    style: Style
    scenes: list[Scene]
    latents: Tensor
    """``[scenes, tokens, 64]`` in float16, with mean zero and variance one."""

    @property
    def tokens(self) -> int:
        """Return the number of image tokens of a picture."""
        return self.latents.shape[1]

    def positions(self) -> Tensor:
        """Return the tokens' ids ``[tokens, 3]``: zero, row, column."""
        width, height = self.size
        ids: Tensor = FluxPipeline._prepare_latent_image_ids(1, height // PATCH, width // PATCH, "cpu", torch.float32)
        return ids


def normalize(vae: AutoencoderKL, seed: int) -> None:
    """Set the autoencoder's shift and scale so that its latents have mean zero and variance one."""
    scenes = _scenes((NATIVE_SIZE, NATIVE_SIZE), "plain", _MEASURED, seed)
    latents = torch.cat([_encode(vae, batch) for batch in _pictures(scenes, (NATIVE_SIZE, NATIVE_SIZE), "plain", seed)])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


def encode(session: Session, vae: AutoencoderKL, counts: dict[Size, int], *, style: Style = "plain") -> list[Bucket]:
    """Return a bucket per size with `counts[size]` pictures; encode those that no earlier run has encoded."""
    return [_bucket(session, vae, size, style, count) for size, count in counts.items()]


def _bucket(session: Session, vae: AutoencoderKL, size: Size, style: Style, count: int) -> Bucket:
    path = session.work / "latents" / f"{style}-{size[0]}x{size[1]}-{count}.pt"
    scenes = _scenes(size, style, count, session.seed)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        vae = vae.to(session.device)
        batches = [_pack(vae, _encode(vae, batch)) for batch in _pictures(scenes, size, style, session.seed)]
        _write(torch.cat(batches), path)
    return Bucket(size, style, scenes, torch.load(path, weights_only=True))


def _write(latents: Tensor, path: Path) -> None:
    scratch = path.with_suffix(".new")
    torch.save(latents, scratch)
    scratch.replace(path)


def _scenes(size: Size, style: Style, count: int, seed: int) -> list[Scene]:
    rng = random.Random(f"{seed} {style} {size}")
    return [draw_scene(rng, held_out=False, style=style) for _ in range(count)]


def _pictures(scenes: Sequence[Scene], size: Size, style: Style, seed: int) -> Iterator[Tensor]:
    """Yield the scenes' pixels in batches."""
    width, height = size
    at_once = max(_ENCODED_AT_ONCE // (width * height), 1)
    rng = random.Random(f"{seed} {style} {size} pictures")
    for start in tqdm(range(0, len(scenes), at_once), desc=f"latents {style} {width}x{height}", mininterval=2):
        batch = scenes[start : start + at_once]
        yield to_pixels([draw_picture(each, width=width, height=height, rng=rng, style=style) for each in batch])


def _pack(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Normalize latents and pack them into FLUX's tokens of two by two latents with 16 channels each."""
    count, channels, height, width = latents.shape
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    packed: Tensor = FluxPipeline._pack_latents(latents, count, channels, height, width)
    return packed.half()


@torch.no_grad()
def _encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Return the means of the latents, on the CPU."""
    mean: Tensor = vae.encode(pixels.to(vae.device)).latent_dist.mean
    return mean.cpu()
