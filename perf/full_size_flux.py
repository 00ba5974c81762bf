"""FLUX.1-dev's true shape with random weights, through the engine and through FluxPipeline, on one device.

Random weights take as long as trained ones, so a GPU without the checkpoint can still be measured: seconds per image at
several sizes, with 1 to 8 images at a time. Needs about 36 GiB of memory in bfloat16. The demo shape is for trying it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import click
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from rich.console import Console
from rich.table import Table
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from genserve_backend.flux.attention import RaggedAttention
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.engine import FluxEngine
from genserve_backend.flux.load import assemble
from genserve_backend.flux.request import parse
from genserve_backend.settings import FluxSettings
from genserve_backend.worker.messages import Done, Event, Failed, Submit
from stopwatch import timed

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))
from flux_parts import clip_tokenizer, flux_scheduler, t5_tokenizer
from make_flux import MAX_SEQUENCE_LENGTH, WORDS, clip_encoder, flux_transformer, flux_vae, t5_encoder

SEQUENCE_LENGTH = {"dev": 512, "demo": 64}
NEVER_S = 3600.0


def dev_parts() -> dict[str, Any]:
    """Transformer, VAE and text encoders with the shapes of FLUX.1-dev's published configurations."""
    clip = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        projection_dim=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
    )
    t5 = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
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


def demo_parts(tokenizers: dict[str, Any]) -> dict[str, Any]:
    """The demo's, for trying the script."""
    return {
        "transformer": flux_transformer(guidance_embeds=True),
        "vae": flux_vae(),
        "text_encoder": clip_encoder(tokenizers["tokenizer"]),
        "text_encoder_2": t5_encoder(tokenizers["tokenizer_2"]),
    }


def make_pipeline(shape: str, device: str, dtype: torch.dtype) -> FluxPipeline:
    """Random weights, drawn on the device."""
    tokenizers = {
        "tokenizer": clip_tokenizer(WORDS),
        "tokenizer_2": t5_tokenizer(WORDS, max_length=MAX_SEQUENCE_LENGTH),
    }
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            parts = dev_parts() if shape == "dev" else demo_parts(tokenizers)
    finally:
        torch.set_default_dtype(before)
    pipeline = FluxPipeline(scheduler=flux_scheduler(schnell=False), **tokenizers, **parts)
    for part in parts.values():
        part.to(device, dtype).eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Engine:
    """The engine, in a thread of its own."""

    def __init__(self, pipeline: FluxPipeline, checkpoint: FluxCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._jobs = 0
        settings = FluxSettings(model_path=checkpoint.path, max_batched_tokens=2**17)
        self._engine: FluxEngine = assemble(pipeline, checkpoint, settings, self._events.put)
        threading.Thread(target=self._engine.run, daemon=True).start()

    def __call__(self, size: int, steps: int, count: int) -> None:
        """Make `count` images at once."""
        for seed in range(count):
            values = {"PROMPT": f"picture {seed}", "STEPS": steps, "SEED": seed, "HEIGHT": size, "WIDTH": size}
            request = parse(values, self._checkpoint, max_pixels=2**28)
            self._jobs += 1
            self._engine.submit(Submit(self._jobs, str(self._jobs), request, time.monotonic() + NEVER_S))
        while count:
            event = self._events.get()
            if isinstance(event, Failed):
                raise event.error
            count -= isinstance(event, Done)


def one_by_one(pipeline: FluxPipeline, length: int) -> Callable[[int, int, int], None]:
    """FluxPipeline, one call an image."""

    def call(size: int, steps: int, count: int) -> None:
        for seed in range(count):
            together(pipeline, length)(size, steps, 1, seed)

    return call


def together(pipeline: FluxPipeline, length: int) -> Callable[..., None]:
    """FluxPipeline, one call for all images: they have the same settings here, as they rarely do."""

    def call(size: int, steps: int, count: int, first: int = 0) -> None:
        pipeline(
            prompt=[f"picture {seed}" for seed in range(first, first + count)],
            height=size,
            width=size,
            num_inference_steps=steps,
            max_sequence_length=length,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(first, first + count)],
        )

    return call


def _numbers(_: click.Context, __: click.Parameter, text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--shape", type=click.Choice(["dev", "demo"]), default="dev", show_default=True)
@click.option("--device", default="cuda:0", show_default=True)
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--sizes", callback=_numbers, default="512,1024", show_default=True, help="Height and width, pixels.")
@click.option("--counts", callback=_numbers, default="1,2,4,8", show_default=True, help="Images at a time.")
@click.option("--steps", type=click.IntRange(1, 100), default=28, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=2, show_default=True)
def main(
    shape: str, device: str, dtype: str, sizes: Sequence[int], counts: Sequence[int], steps: int, repeats: int
) -> None:
    """Measure seconds per image through the engine and through FluxPipeline."""
    length = SEQUENCE_LENGTH[shape]
    with torch.inference_mode():
        pipeline = make_pipeline(shape, device, getattr(torch, dtype))
    checkpoint = FluxCheckpoint(Path("/random"), f"random-{shape}", max(sizes), True, length)
    engine = Engine(pipeline, checkpoint)
    contenders = {
        "FluxPipeline, one by one": (FluxAttnProcessor(), one_by_one(pipeline, length)),
        "FluxPipeline, one call": (FluxAttnProcessor(), together(pipeline, length)),
        "Engine": (RaggedAttention(), engine),
    }
    table = Table("Size", "Images at a time", *(f"{name}, s an image" for name in contenders), "Engine is")
    for size in sizes:
        for count in counts:
            seconds = []
            for processor, call in contenders.values():
                pipeline.transformer.set_attn_processor(processor)
                seconds.append(timed(lambda call=call: call(size, steps, count), repeats) / count)  # noqa: B023
            table.add_row(
                str(size),
                str(count),
                *(f"{each:.3f}" for each in seconds),
                f"{seconds[0] / seconds[-1]:.2f} x the first",
            )
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)


if __name__ == "__main__":
    main()
