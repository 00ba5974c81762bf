"""A tiny FLUX checkpoint: the real architecture and folder layout, random weights, a few megabytes.

For tests of variants that the trained checkpoint lacks, such as schnell. The images are abstract patterns that depend
on the prompt and the seed; `train_flux.py` trains a checkpoint that draws its prompt.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from transformers.utils import logging as transformers_logging

from flux_parts import (
    CLIP_LENGTH,
    Parts,
    clip_tokenizer,
    flux_scheduler,
    t5_tokenizer,
    write_checkpoint,
)
from output_folder import staged

# GenServe takes both from a checkpoint: the native image size and the longest prompt in T5 tokens.
NATIVE_SIZE = 128
MAX_SEQUENCE_LENGTH = 64

TEXT_WIDTH = 64
HEADS = 4
HEAD_WIDTH = 16
ROPE_AXES = (4, 6, 6)
VAE_CHANNELS = (16, 16, 32, 32)

# Added to --seed: with this offset, the default checkpoint has clear and varied colours.
FIRST_SEED = 2

CAPTIONS = (
    "a photo of an astronaut riding a horse on mars",
    "a lighthouse on a cliff at sunset, oil painting",
    "a bowl of fresh fruit on a wooden table in the morning light",
    "an old red tram in a narrow street of lisbon",
    "a small robot watering flowers in a green garden",
    "portrait of a woman with a pearl earring, soft light, highly detailed",
    "a cat sleeping on a blue sofa, watercolor",
    "two dogs playing in the snow near a forest",
    "a steaming cup of coffee and an open book by the window",
    "city skyline at night with neon lights reflected in the rain",
    "a sailing boat on a calm sea under a cloudy sky",
    "an abstract pattern of circles and waves in yellow, orange and purple",
    "a castle on a hill above the river in autumn, cinematic, sharp focus",
    "a macro photograph of a butterfly on a white flower",
    "an isometric drawing of a tiny house with a black roof and a brown door",
    "a whale flying over the mountains, digital art, high quality",
    "low quality, blurry, bad anatomy, watermark, text",
)
WORDS = tuple(dict.fromkeys(" ".join(CAPTIONS).replace(",", " ").split()))
"""Words of the tokenizers."""


def spread(module: nn.Module, *, gain: float = 1.0) -> None:
    """Draw the weights of all linear layers and embeddings so that activations keep a variance near one.

    With the usual initial scales (a deviation of 0.02) a network nearly ignores its input; here every prompt, seed and
    timestep has to make a visible difference.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=gain / math.sqrt(part.in_features))
            if part.bias is not None:
                nn.init.normal_(part.bias, std=0.1)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight)


def clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return a two-layer CLIP text encoder for `tokenizer`."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    spread(model)
    return model.eval()


def t5_encoder(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    """Return a two-layer T5 v1.1 encoder for `tokenizer`."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    model = T5EncoderModel(config)
    spread(model)
    for name, weight in model.named_parameters():
        # T5 does not scale its attention scores by the head's width: its queries have to be small.
        if name.endswith("SelfAttention.q.weight"):
            weight.data /= math.sqrt(config.d_kv)
    return model.eval()


def flux_transformer(*, guidance_embeds: bool) -> FluxTransformer2DModel:
    """Return a FLUX transformer with six double and twelve single blocks."""
    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=6,
        num_single_layers=12,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=ROPE_AXES,
    )
    spread(model)
    # The pooled prompt sets the palette. Time and guidance have less weight: bfloat16 rounds them before they are
    # embedded, and at full weight that rounding alone would change the image.
    embedders = model.time_text_embed
    spread(embedders.text_embedder, gain=1.5)
    spread(embedders.timestep_embedder, gain=0.5)
    if guidance_embeds:
        spread(embedders.guidance_embedder, gain=0.5)
    return model.eval()


def smooth(convolution: nn.Conv2d) -> None:
    """Draw the weights of a 3x3 convolution: random mixing of channels, blur, and a little texture."""
    outputs, inputs = convolution.weight.shape[:2]
    tap = torch.tensor([0.25, 0.5, 0.25])
    mix = torch.randn(outputs, inputs, 1, 1) / math.sqrt(inputs)
    texture = 0.03 * torch.randn(outputs, inputs, 3, 3) / math.sqrt(inputs)
    convolution.weight.data.copy_(1.6 * mix * torch.outer(tap, tap) + texture)
    if convolution.bias is not None:
        nn.init.normal_(convolution.bias, std=0.3)


def flux_vae() -> AutoencoderKL:
    """Return a VAE with FLUX's latent space: 16 channels, an eighth of the image's size.

    A decoder with independent random weights makes coloured noise of latents; blurring weights make soft shapes.
    """
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=VAE_CHANNELS,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=NATIVE_SIZE,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    for part in model.decoder.modules():
        if isinstance(part, nn.Conv2d) and part.kernel_size == (3, 3):
            smooth(part)
    # Part of the last layer is common to red, green and blue, for muted colours and few clipped values.
    last = model.decoder.conv_out
    last.weight.data.copy_(0.35 * last.weight + 0.5 * last.weight.mean(dim=0, keepdim=True))
    nn.init.zeros_(last.bias)
    return model.eval()


def random_parts(*, seed: int, schnell: bool) -> Parts:
    """Return parts with random weights; the caller's random state does not change."""
    tokenizer, tokenizer_2 = clip_tokenizer(WORDS), t5_tokenizer(WORDS, max_length=MAX_SEQUENCE_LENGTH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(FIRST_SEED + seed)
        return Parts(
            scheduler=flux_scheduler(schnell=schnell),
            tokenizer=tokenizer,
            text_encoder=clip_encoder(tokenizer),
            tokenizer_2=tokenizer_2,
            text_encoder_2=t5_encoder(tokenizer_2),
            vae=flux_vae(),
            transformer=flux_transformer(guidance_embeds=not schnell),
        )


def write_random_flux(output: Path, *, seed: int = 0, schnell: bool = False) -> None:
    """Write the checkpoint to `output`, in place of an earlier one.

    Args:
        output: The folder to write. It appears complete or not at all.
        seed: Seed of all weights: the same seed gives the same bytes.
        schnell: Write a variant like FLUX.1-schnell, without guidance embedding and with fixed timesteps.

    Raises:
        FileExistsError: `output` is not empty and not a checkpoint.
    """
    with staged(output, marker="model_index.json") as folder:
        write_checkpoint(folder, random_parts(seed=seed, schnell=schnell))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Write a tiny FLUX checkpoint with random weights.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: 0)")
    parser.add_argument("--schnell", action="store_true", help="write a variant like FLUX.1-schnell")
    parser.add_argument("--force", action="store_true", help="replace an earlier checkpoint")
    options = parser.parse_args(arguments)

    if options.output.exists() and not options.force:
        print(f"{options.output} exists: nothing to do (--force replaces it)")
        return 0
    transformers_logging.disable_progress_bar()
    try:
        write_random_flux(options.output, seed=options.seed, schnell=options.schnell)
    except OSError as error:
        print(f"random_flux: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
