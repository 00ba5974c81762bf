"""Previews: small pictures of unfinished images, straight from their latents."""

from __future__ import annotations

import io

import torch
from diffusers import FluxPipeline
from PIL import Image

PREVIEW_PIXELS = 128
"""The longer side of a preview."""
SAMPLE = 32
"""Height and width, in latents, of the samples that the map is fitted to."""
QUALITY = 75


class Previewer:
    """A linear map from latents to RGB, fitted to the checkpoint's VAE at load time.

    Args:
        pipeline: The pipeline with the VAE.
    """

    def __init__(self, pipeline: FluxPipeline) -> None:
        self._pipeline = pipeline
        self._map = fit(pipeline)

    def jpeg(self, latents: torch.Tensor, height: int, width: int) -> bytes:
        """Return a JPEG of at most `PREVIEW_PIXELS` per side from packed latents ``[tokens, 64]`` on any device."""
        packed = latents[None].float().cpu()
        grid = self._pipeline._unpack_latents(packed, height, width, self._pipeline.vae_scale_factor)[0]
        pixels = torch.tensordot(self._map[:, :-1], grid, dims=1) + self._map[:, -1, None, None]
        levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        image = Image.fromarray(levels.permute(1, 2, 0).numpy())
        scale = PREVIEW_PIXELS / max(image.size)
        image = image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BICUBIC
        )
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=QUALITY)
        return buffer.getvalue()


@torch.inference_mode()
def fit(pipeline: FluxPipeline) -> torch.Tensor:
    """Return the least-squares map ``[3, channels + 1]`` from latents and a one to their pixels' mean color, -1 to 1.

    The samples are patches of plain color that the VAE encodes, and smooth noise that it decodes. The map is on the CPU
    in float32 and takes latents in the transformer's scale. The random state is restored.
    """
    vae = pipeline.vae
    scaling, shift = vae.config.scaling_factor, vae.config.shift_factor
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patches = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8) * 2 - 1, size=SAMPLE * 8)
        noise = torch.nn.functional.interpolate(
            2 * torch.randn(4, vae.config.latent_channels, SAMPLE // 4, SAMPLE // 4), size=SAMPLE, mode="bicubic"
        )
    encoded = vae.encode(patches.to(pipeline.transformer.device, vae.dtype)).latent_dist.mode()
    latents = torch.cat([(encoded - shift) * scaling, noise.to(encoded)])
    pixels = vae.decode(latents / scaling + shift, return_dict=False)[0]
    colors = torch.nn.functional.avg_pool2d(pixels.float().clamp(-1, 1), pixels.shape[-1] // SAMPLE)
    inputs = latents.float().transpose(0, 1).flatten(1).cpu()
    inputs = torch.cat([inputs, torch.ones(1, inputs.shape[1])])
    solution: torch.Tensor = torch.linalg.lstsq(
        inputs.T, colors.transpose(0, 1).flatten(1).T.cpu(), driver="gelsd"
    ).solution
    return solution.T
