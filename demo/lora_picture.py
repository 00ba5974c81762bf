"""The README's picture of the LoRAs: prompts without one, with each, and with both mixed, by plain `FluxPipeline`.

``python demo/lora_picture.py [--output docs/images/loras.png]``
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import torch
from diffusers import FluxPipeline
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
PROMPTS = (
    "a large red circle",
    "a large green square",
    "a large pink triangle",
)
COLUMNS: tuple[tuple[str, dict[str, float]], ...] = (
    ("no LoRA", {}),
    ("neon", {"neon": 1.0}),
    ("blueprint", {"blueprint": 1.0}),
    ("neon=0.6, blueprint=0.6", {"neon": 0.6, "blueprint": 0.6}),
)
"""Heading and weights of each column."""
SIZE = 160
"""Side of an image in the picture in pixels; images are generated at the checkpoint's native size."""
CAPTION, HEADING, MARGIN = 150, 28, 8


def draw(flux: Path, loras: Path, output: Path, *, seed: int, steps: int) -> None:
    """Generate all images, and write the picture."""
    pipeline = FluxPipeline.from_pretrained(flux, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for name in sorted({name for _, weights in COLUMNS for name in weights}):
        pipeline.load_lora_weights(loras / name, adapter_name=name)
    width = CAPTION + len(COLUMNS) * (SIZE + MARGIN) + MARGIN
    picture = Image.new("RGB", (width, HEADING + len(PROMPTS) * (SIZE + MARGIN)), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for row, prompt in enumerate(PROMPTS):
        middle = HEADING + row * (SIZE + MARGIN) + SIZE / 2
        pen.multiline_text((MARGIN, middle), textwrap.fill(prompt, 19), fill="black", font=font, anchor="lm")
    for column, (heading, weights) in enumerate(COLUMNS):
        left = CAPTION + MARGIN + column * (SIZE + MARGIN)
        pen.text((left + SIZE / 2, HEADING / 2), heading, fill="black", font=font, anchor="mm")
        for row, image in enumerate(generate(pipeline, weights, seed=seed, steps=steps)):
            top = HEADING + row * (SIZE + MARGIN)
            picture.paste(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS), (left, top))
            pen.rectangle((left, top, left + SIZE - 1, top + SIZE - 1), outline="lightgray")
    output.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(256).save(output, optimize=True)


def generate(pipeline: FluxPipeline, weights: dict[str, float], *, seed: int, steps: int) -> list[Image.Image]:
    """Return an image of each prompt with these adapters."""
    pipeline.disable_lora()
    if weights:
        pipeline.enable_lora()
        pipeline.set_adapters(list(weights), list(weights.values()))
    images: list[Image.Image] = pipeline(
        list(PROMPTS),
        height=pipeline.vae.config.sample_size,
        width=pipeline.vae.config.sample_size,
        num_inference_steps=steps,
        max_sequence_length=pipeline.tokenizer_2.model_max_length,
        generator=[torch.Generator().manual_seed(seed) for _ in PROMPTS],
    ).images
    return images


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Draw the README's picture of the LoRAs.")
    parser.add_argument("--flux", type=Path, default=HERE / "flux")
    parser.add_argument("--loras", type=Path, default=HERE / "loras")
    parser.add_argument("--output", type=Path, default=Path("docs/images/loras.png"))
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    draw(options.flux, options.loras, options.output, seed=options.seed, steps=options.steps)


if __name__ == "__main__":
    main()
