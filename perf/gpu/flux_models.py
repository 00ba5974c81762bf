"""FLUX with random weights, which take as long as trained ones, and the count of its arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from flux_parts import clip_tokenizer, flux_scheduler, t5_tokenizer
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.request import FluxRequest, parse
from make_flux import MAX_SEQUENCE_LENGTH, WORDS, clip_encoder, flux_transformer, flux_vae, t5_encoder

DEV_SEQUENCE_LENGTH = 512
DEMO = Path(__file__).parents[2] / "demo" / "flux"


@dataclass(frozen=True)
class Flux:
    """A pipeline on its device, and what its engine has to know of it."""

    pipeline: FluxPipeline
    checkpoint: FluxCheckpoint

    def request(self, **values: Any) -> FluxRequest:
        """Return a checked request; tensors by name."""
        return parse({"PROMPT": "a picture", **values}, self.checkpoint, max_pixels=2**28)


def make_flux(device: str, *, tiny: bool, whole: bool) -> Flux:
    """Make FLUX.1-dev's true shape in bfloat16 on `device`.

    Args:
        device: Where the weights are drawn.
        tiny: The demo's shape instead.
        whole: All layers of the text encoders; else one, where only the transformer is measured.
    """
    tokenizers = {
        "tokenizer": clip_tokenizer(WORDS),
        "tokenizer_2": t5_tokenizer(WORDS, max_length=MAX_SEQUENCE_LENGTH),
    }
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            parts = _demo_parts(tokenizers) if tiny else _dev_parts(whole=whole)
    finally:
        torch.set_default_dtype(before)
    pipeline = FluxPipeline(scheduler=flux_scheduler(schnell=False), **tokenizers, **parts)
    for part in parts.values():
        part.to(device, torch.bfloat16).eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    length = MAX_SEQUENCE_LENGTH if tiny else DEV_SEQUENCE_LENGTH
    return Flux(pipeline, FluxCheckpoint(Path("/random"), "random", 1024, True, length))


def _dev_parts(*, whole: bool) -> dict[str, Any]:
    """Make the transformer, VAE and text encoders as FLUX.1-dev's published configurations say."""
    clip = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        projection_dim=768,
        num_hidden_layers=12 if whole else 1,
        num_attention_heads=12,
        max_position_embeddings=77,
    )
    t5 = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24 if whole else 1,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return {
        "transformer": FluxTransformer2DModel(guidance_embeds=True),
        "vae": vae,
        "text_encoder": CLIPTextModel(clip),
        "text_encoder_2": T5EncoderModel(t5),
    }


def _demo_parts(tokenizers: dict[str, Any]) -> dict[str, Any]:
    return {
        "transformer": flux_transformer(guidance_embeds=True),
        "vae": flux_vae(),
        "text_encoder": clip_encoder(tokenizers["tokenizer"]),
        "text_encoder_2": t5_encoder(tokenizers["tokenizer_2"]),
    }


def load_demo(device: str, dtype: torch.dtype) -> FluxPipeline:
    """Load the demo's trained checkpoint as diffusers does."""
    pipeline = FluxPipeline.from_pretrained(DEMO, dtype=dtype, local_files_only=True, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def call(pipeline: FluxPipeline, requests: list[FluxRequest]) -> list[Any]:
    """Make images with FluxPipeline, all in one call; they have size, steps and guidance in common."""
    first = requests[0]
    return list(
        pipeline(
            prompt=[request.prompt for request in requests],
            height=first.height,
            width=first.width,
            num_inference_steps=first.steps,
            guidance_scale=first.guidance,
            max_sequence_length=first.max_sequence_length,
            generator=[torch.Generator("cpu").manual_seed(request.seed) for request in requests],
        ).images
    )


def step_flops(transformer: Any, *, rows: int, image_tokens: int, text_tokens: int) -> float:
    """Return the operations of one forward: matrix products and attention, padding counted as it is computed."""
    config = transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    blocks = config.num_layers + config.num_single_layers
    tokens = image_tokens + text_tokens
    # A token passes queries, keys, values, the output and two matrices of four times the width, in either kind.
    products = 2 * 12 * width**2 * tokens * blocks
    attention = 4 * tokens**2 * width * blocks
    modulation = 2 * width**2 * (12 * config.num_layers + 3 * config.num_single_layers)
    return float(rows * (products + attention + modulation))
