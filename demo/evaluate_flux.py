"""Accuracy of the demo's FLUX: the share of images that show their prompt, detected from the pixels alone.

``python demo/evaluate_flux.py [--count 600]`` draws scenes with combinations of shape, colour and background that were
held out of training, generates images for their captions with plain `FluxPipeline`, and prints a table. The exit status
is 1 if a share is below the minimum for the shipped checkpoint.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxPipeline
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from shapes.captions import describe
from shapes.detection import detect
from shapes.judging import judge
from shapes.scenes import Scene, draw_scene

HERE = Path(__file__).resolve().parent
WANTED = {"background": 0.95, "colour": 0.90, "shape": 0.85, "relation": 0.70}
"""Minimum share of right images for the shipped checkpoint."""

ASPECTS = {
    "background": "background",
    "number": "number of things",
    "colour": "colour of a thing",
    "shape": "shape of a thing",
    "place": "place of a single thing",
    "relation": "relation of two things",
    "everything": "everything",
}
"""Judged aspects, with their names in the table."""


def prompts(count: int, seed: int) -> list[tuple[Scene, str]]:
    """Draw held-out scenes with a caption each; every second one has two things."""
    rng = random.Random(f"evaluation {seed}")
    scenes = [draw_scene(rng, held_out=True, two=index % 2 == 1) for index in range(count)]
    return [(scene, describe(scene, rng)) for scene in scenes]


@dataclass(frozen=True)
class Sampling:
    """Options of the image generation."""

    steps: int = 20
    guidance: float = 3.5
    size: int | None = None
    """Height and width in pixels; None for the checkpoint's native size."""
    tokens: int | None = None
    """T5 tokens of a prompt; None for the tokenizer's maximum."""
    batch: int = 50


def evaluate(
    pipeline: FluxPipeline, asked: list[tuple[Scene, str]], sampling: Sampling, *, output: Path | None = None
) -> dict[str, list[bool]]:
    """Return one boolean per image for each aspect; write the images to the folder `output`."""
    found: dict[str, list[bool]] = defaultdict(list)
    for start in tqdm(range(0, len(asked), sampling.batch), unit="batch"):
        batch = asked[start : start + sampling.batch]
        images: list[Image.Image] = pipeline(
            [caption for _, caption in batch],
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            max_sequence_length=sampling.tokens or pipeline.tokenizer_2.model_max_length,
            height=sampling.size or pipeline.vae.config.sample_size,
            width=sampling.size or pipeline.vae.config.sample_size,
            generator=[torch.Generator().manual_seed(start + index) for index in range(len(batch))],
        ).images
        for index, ((scene, caption), image) in enumerate(zip(batch, images, strict=True)):
            aspects = list(judge(scene, detect(image)))
            for aspect, right in [*aspects, ("everything", all(right for _, right in aspects))]:
                found[aspect].append(right)
            if output:
                wrong = "-".join(aspect for aspect, right in aspects if not right)
                image.save(output / f"{start + index:04}{'-wrong-' + wrong if wrong else ''} {caption}.png")
    return found


def table(found: dict[str, list[bool]]) -> str:
    """Return the shares as a Markdown table."""
    lines = ["| aspect | right | of | wanted |", "| --- | --- | --- | --- |"]
    for aspect, name in ASPECTS.items():
        wanted = f"{WANTED[aspect]:.0%}" if aspect in WANTED else ""
        if right := found[aspect]:
            lines.append(f"| {name} | {sum(right) / len(right):.1%} | {len(right)} | {wanted} |")
    return "\n".join(lines)


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Measure how often the demo's FLUX draws its prompt.")
    parser.add_argument("--flux", type=Path, default=HERE / "flux", help="checkpoint (default: demo/flux)")
    parser.add_argument("--count", type=int, default=600, help="images (default: 600)")
    parser.add_argument("--steps", type=int, default=Sampling.steps)
    parser.add_argument("--guidance", type=float, default=Sampling.guidance)
    parser.add_argument("--size", type=int, help="pixels of height and width (default: the native size)")
    parser.add_argument("--tokens", type=int, help="T5 tokens of a prompt (default: the tokenizer's maximum)")
    parser.add_argument("--batch", type=int, default=Sampling.batch, help="images per call")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="folder for the images, named by caption and wrong aspects")
    options = parser.parse_args()
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)

    transformers_logging.disable_progress_bar()
    pipeline = FluxPipeline.from_pretrained(options.flux, torch_dtype=torch.float32).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    sampling = Sampling(options.steps, options.guidance, options.size, options.tokens, options.batch)
    started = time.monotonic()
    found = evaluate(pipeline, prompts(options.count, options.seed), sampling, output=options.output)
    took = time.monotonic() - started
    print(table(found))
    print(f"{options.count} images of {sampling.steps} steps, guidance {sampling.guidance:g}, in {took:.0f} s")
    return 0 if all(sum(found[aspect]) >= share * len(found[aspect]) for aspect, share in WANTED.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
