"""Writes a tiny FLUX checkpoint: the real architecture and folder layout, random weights, a few megabytes.

It is for tests that want a variant the trained one does not have, such as schnell. The images are abstract patterns
that follow the prompt's text and the seed, not pictures of what the prompt says. `train_flux.py` makes those.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
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

# Two numbers that GenServe reads from a checkpoint: the native image size and the longest prompt in T5 tokens.
NATIVE_SIZE = 128
MAX_SEQUENCE_LENGTH = 64
CLIP_LENGTH = 77

TEXT_WIDTH = 64
HEADS = 4
HEAD_WIDTH = 16
ROPE_AXES = (4, 6, 6)
VAE_CHANNELS = (16, 16, 32, 32)

# Added to --seed, because random weights differ in taste: this makes the default one with clear and varied colours.
FIRST_SEED = 2

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
T5_PAD, T5_END, T5_UNKNOWN = "<pad>", "</s>", "<unk>"

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
"""What the tokenizers know by default."""


def joined(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """`symbols` with every occurrence of `pair` made one symbol."""
    result: list[str] = []
    index = 0
    while index < len(symbols):
        width = 2 if tuple(symbols[index : index + 2]) == pair else 1
        result.append("".join(symbols[index : index + width]))
        index += width
    return result


def learn_merges(vocabulary: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first, until every word of `vocabulary` is one symbol.

    The tokenizers library has a trainer, but it breaks ties differently on each run.
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in vocabulary]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for symbols in spelled for pair in pairwise(symbols)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spelled = [joined(symbols, best) for symbols in spelled]
    return merges


def clip_tokenizer(words: Sequence[str] = WORDS) -> CLIPTokenizer:
    """A byte-level BPE tokenizer like CLIP's, with merges learnt from the words.

    Every byte is a token, alone and at the end of a word, so there is no text that it cannot encode.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges(words)
    # The same order as in CLIP's vocabulary: bytes, bytes that end a word, merges, the two special tokens.
    tokens = [*alphabet, *(character + "</w>" for character in alphabet), *map("".join, merges), CLIP_START, CLIP_END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)


def t5_tokenizer(words: Sequence[str] = WORDS, *, max_length: int = MAX_SEQUENCE_LENGTH) -> PreTrainedTokenizerFast:
    """A unigram tokenizer like T5's, with the words and byte fallback for everything else.

    The class is not T5Tokenizer because transformers 5 rebuilds that one without byte fallback when it loads a folder.
    """
    special = [(T5_PAD, 0.0), (T5_END, 0.0), (T5_UNKNOWN, 0.0)]
    pieces = [(f"\u2581{word}", -6.0) for word in words]
    characters = [(chr(code), -9.0) for code in range(ord("!"), ord("~") + 1)]
    fallback = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    vocabulary = [*special, ("\u2581", -7.0), *pieces, *characters, *fallback]

    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {T5_END}", special_tokens=[(T5_END, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token=T5_PAD,
        eos_token=T5_END,
        unk_token=T5_UNKNOWN,
    )


def spread(module: nn.Module, *, gain: float = 1.0) -> None:
    """Draw the weights of all linear layers and embeddings so that activations keep a variance near one.

    The usual initial scales (a deviation of 0.02) leave a network that nearly ignores its input; here every prompt,
    seed and timestep has to make a visible difference.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=gain / math.sqrt(part.in_features))
            if part.bias is not None:
                nn.init.normal_(part.bias, std=0.1)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight)


def clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text encoder for `tokenizer`."""
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
    """A two-layer T5 v1.1 encoder for `tokenizer`."""
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
        # T5 does not divide its attention scores by the square root of the head's width: its queries have to be small.
        if name.endswith("SelfAttention.q.weight"):
            weight.data /= math.sqrt(config.d_kv)
    return model.eval()


def flux_transformer(*, guidance_embeds: bool) -> FluxTransformer2DModel:
    """A FLUX transformer with six double and twelve single blocks."""
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
    # The pooled prompt sets the palette. Time and guidance count for less: bfloat16 rounds them before they are
    # embedded, and at full strength that rounding alone would give another image.
    embedders = model.time_text_embed
    spread(embedders.text_embedder, gain=1.5)
    spread(embedders.timestep_embedder, gain=0.5)
    if guidance_embeds:
        spread(embedders.guidance_embedder, gain=0.5)
    return model.eval()


def smooth(convolution: nn.Conv2d) -> None:
    """Draw a 3x3 convolution that mixes channels at random and blurs, with a little texture on top."""
    outputs, inputs = convolution.weight.shape[:2]
    tap = torch.tensor([0.25, 0.5, 0.25])
    mix = torch.randn(outputs, inputs, 1, 1) / math.sqrt(inputs)
    texture = 0.03 * torch.randn(outputs, inputs, 3, 3) / math.sqrt(inputs)
    convolution.weight.data.copy_(1.6 * mix * torch.outer(tap, tap) + texture)
    if convolution.bias is not None:
        nn.init.normal_(convolution.bias, std=0.3)


def flux_vae() -> AutoencoderKL:
    """A VAE with FLUX's latent space: 16 channels, an eighth of the image's size.

    A decoder with independent random weights turns latents into coloured noise; blurring ones make soft shapes of them.
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
    # Part of the last layer is common to red, green and blue: muted colours, and few values that clip.
    last = model.decoder.conv_out
    last.weight.data.copy_(0.35 * last.weight + 0.5 * last.weight.mean(dim=0, keepdim=True))
    nn.init.zeros_(last.bias)
    return model.eval()


def flux_scheduler(*, schnell: bool) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of FLUX.1-dev, or of FLUX.1-schnell."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=1.0 if schnell else 3.0,
        use_dynamic_shifting=not schnell,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


@dataclass(frozen=True)
class Parts:
    """What a FLUX checkpoint consists of."""

    scheduler: FlowMatchEulerDiscreteScheduler
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    tokenizer_2: PreTrainedTokenizerFast
    text_encoder_2: T5EncoderModel
    transformer: FluxTransformer2DModel
    vae: AutoencoderKL


def write_index(folder: Path) -> None:
    """Write model_index.json, which names the class of each part.

    FluxPipeline would write it too, but names classes that only transformers 5 has.
    """
    parts = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    index = {"_class_name": "FluxPipeline", "_diffusers_version": diffusers.__version__, **parts}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def change_json(path: Path, **values: str) -> None:
    """Set values in a JSON file."""
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | values, indent=2) + "\n", encoding="utf-8")


def write_tokenizers(folder: Path, tokenizer: CLIPTokenizer, tokenizer_2: PreTrainedTokenizerFast) -> None:
    """Write both tokenizers so that transformers 4 and 5 read them."""
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))  # vocab.json and merges.txt, for transformers 4
    tokenizer_2.save_pretrained(folder / "tokenizer_2")
    change_json(folder / "tokenizer_2" / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def write_clip_encoder(folder: Path, model: CLIPTextModel) -> None:
    """Write CLIP's text encoder with the weight names of the published checkpoints.

    transformers 5 reads those and writes shorter ones. transformers 4 does not know these and would skip the weights.
    """
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in load_file(path).items()}
    path.unlink()  # The loaded weights may still be mapped from this file: it must not be overwritten in place.
    save_file(weights, path, metadata={"format": "pt"})


def write_checkpoint(folder: Path, parts: Parts) -> None:
    """Write all parts into `folder`."""
    write_tokenizers(folder, parts.tokenizer, parts.tokenizer_2)
    write_clip_encoder(folder / "text_encoder", parts.text_encoder)
    parts.text_encoder_2.save_pretrained(folder / "text_encoder_2")
    # Where nobody says otherwise, transformers takes this dtype and diffusers float32: they have to be the same.
    for name in ("text_encoder", "text_encoder_2"):
        change_json(folder / name / "config.json", dtype="float32")
    parts.scheduler.save_pretrained(folder / "scheduler")
    parts.vae.save_pretrained(folder / "vae")
    parts.transformer.save_pretrained(folder / "transformer")
    write_index(folder)
    # Weights are written for their owner alone; a server in a container often runs as someone else.
    mode = (folder / "model_index.json").stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def random_parts(*, seed: int, schnell: bool) -> Parts:
    """Parts with random weights; the caller's random state is left as it was."""
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
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


@contextlib.contextmanager
def staged(output: Path, *, marker: str) -> Iterator[Path]:
    """A folder beside `output` to write into, which becomes `output` when the block ends without an error.

    Raises:
        FileExistsError: `output` holds something else than an earlier result, which has the file `marker`.
    """
    if output.exists() and not (output / marker).is_file() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"{output} exists and has no {marker}: not replaced")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        folder = Path(scratch) / "new"
        folder.mkdir()
        yield folder
        if output.exists():
            output.rename(Path(scratch) / "old")
        folder.rename(output)


def make_flux(output: Path, *, seed: int = 0, schnell: bool = False) -> None:
    """Write the checkpoint to `output`, in place of an earlier one.

    Args:
        output: The folder to write. It appears complete or not at all.
        seed: Decides all weights: the same seed gives the same bytes.
        schnell: Write the variant without guidance embedding and with fixed timesteps, like FLUX.1-schnell.

    Raises:
        FileExistsError: `output` holds something that is not a checkpoint.
    """
    with staged(output, marker="model_index.json") as folder:
        write_checkpoint(folder, random_parts(seed=seed, schnell=schnell))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write a tiny FLUX checkpoint with random weights.")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="decides the weights (default: 0)")
    parser.add_argument("--schnell", action="store_true", help="write the variant that is like FLUX.1-schnell")
    parser.add_argument("--force", action="store_true", help="replace an earlier checkpoint")
    options = parser.parse_args(arguments)

    if options.output.exists() and not options.force:
        print(f"{options.output} exists: nothing to do (--force replaces it)")
        return 0
    transformers_logging.disable_progress_bar()
    try:
        make_flux(options.output, seed=options.seed, schnell=options.schnell)
    except OSError as error:
        print(f"make_flux: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
