"""Measures how often the demo's FLUX draws what its prompt says, from the pixels alone.

``python demo/evaluate_flux.py [--count 600]`` makes up scenes whose combinations of shape, colour and background were
held out of training, generates their captions by plain `FluxPipeline`, and prints a table. The exit status says whether
the checkpoint is as good as the one that is shipped has to be.
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
from shapes.judging import judge
from shapes.reading import read_picture
from shapes.scenes import Scene, draw_scene

HERE = Path(__file__).resolve().parent
WANTED = {"background": 0.95, "colour": 0.90, "shape": 0.85, "relation": 0.70}
"""The share of right ones that the shipped checkpoint has to reach."""


ASPECTS = {
    "background": "background",
    "number": "number of things",
    "colour": "colour of a thing",
    "shape": "shape of a thing",
    "place": "place of a single thing",
    "relation": "relation of two things",
    "everything": "everything",
}
"""What is judged, as the table calls it."""


def prompts(count: int, seed: int) -> list[tuple[Scene, str]]:
    """Held-out scenes with a caption each; every second one has two things."""
    rng = random.Random(f"evaluation {seed}")
    scenes = [draw_scene(rng, held_out=True, two=index % 2 == 1) for index in range(count)]
    return [(scene, describe(scene, rng)) for scene in scenes]


@dataclass(frozen=True)
class Sampling:
    """How the images are made."""

    steps: int = 20
    guidance: float = 3.5
    size: int | None = None
    """Height and width in pixels; by default the checkpoint's native size."""
    tokens: int | None = None
    """T5 tokens of a prompt; by default what the tokenizer says."""
    batch: int = 50


def evaluate(
    pipeline: FluxPipeline, asked: list[tuple[Scene, str]], sampling: Sampling, *, output: Path | None = None
) -> dict[str, list[bool]]:
    """Every aspect of the scenes with whether each image has it; the images go to the folder `output`."""
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
            aspects = list(judge(scene, read_picture(image)))
            for aspect, right in [*aspects, ("everything", all(right for _, right in aspects))]:
                found[aspect].append(right)
            if output:
                wrong = "-".join(aspect for aspect, right in aspects if not right)
                image.save(output / f"{start + index:04}{'-wrong-' + wrong if wrong else ''} {caption}.png")
    return found


def table(found: dict[str, list[bool]]) -> str:
    """The shares in Markdown."""
    lines = ["| aspect | right | of | wanted |", "| --- | --- | --- | --- |"]
    for aspect, name in ASPECTS.items():
        wanted = f"{WANTED[aspect]:.0%}" if aspect in WANTED else ""
        if right := found[aspect]:
            lines.append(f"| {name} | {sum(right) / len(right):.1%} | {len(right)} | {wanted} |")
    return "\n".join(lines)


def main() -> int:
    """Read the arguments, and measure; returns the exit status."""
    parser = argparse.ArgumentParser(description="Measure how often the demo's FLUX draws what its prompt says.")
    parser.add_argument("--flux", type=Path, default=HERE / "flux", help="the checkpoint (default: demo/flux)")
    parser.add_argument("--count", type=int, default=600, help="images (default: 600)")
    parser.add_argument("--steps", type=int, default=Sampling.steps)
    parser.add_argument("--guidance", type=float, default=Sampling.guidance)
    parser.add_argument("--size", type=int, help="pixels of height and width (default: the native size)")
    parser.add_argument("--tokens", type=int, help="T5 tokens of a prompt (default: what the tokenizer says)")
    parser.add_argument("--batch", type=int, default=Sampling.batch, help="images at once")
    parser.add_argument("--seed", type=int, default=0, help="decides the scenes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="a folder for the images, named by caption and what is wrong")
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
