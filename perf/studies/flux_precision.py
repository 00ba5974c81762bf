"""Speed and quality of FLUX's dtypes on a CPU, against float32.

Speed: a step of the engine with the demo's transformer, and with a random one that is as wide as larger models are, all
dtypes in turn. Quality: the share of the demo's images that show their prompt, as `demo/evaluate_flux.py` judges them,
and the distance of each image from the one in float32 with the same seed.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import click
import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "demo"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import COUNT, FLUX_CHECKPOINT, SETTINGS, fail, new_table, show
from evaluate_flux import ASPECTS, Sampling, prompts
from genserve_backend.checkpoints import CheckpointError
from genserve_backend.flux import precision
from genserve_backend.flux.build import assemble, load_pipeline
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.request import parse
from genserve_backend.settings import FluxDType, FluxSettings
from gpu.driver import SteppedDriver
from shapes.detection import detect
from shapes.judging import judge

EXACT: FluxDType = "float32"
DTYPES: tuple[FluxDType, ...] = (EXACT, "bfloat16", "int8", "int8wo")
HEAD = 128
WARM_UP = 2
WANTED_POINTS = 2.0
"""Largest loss of adherence in percentage points."""


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Return the peak signal-to-noise ratio of two images in dB; infinity if they are equal."""
    error = float(np.mean((np.asarray(one, float) - np.asarray(other, float)) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def load(dtype: FluxDType, width: int | None) -> tuple[FluxPipeline, FluxSettings]:
    """Load the demo's checkpoint in a dtype, with a random transformer of `width` instead of its own."""
    settings = FluxSettings(model_path=FLUX_CHECKPOINT, dtype=dtype, max_batched_tokens=2**17)
    precision.require_support(settings, "cpu")
    if width is None:
        return load_pipeline(FluxCheckpoint.load(FLUX_CHECKPOINT), settings, "cpu"), settings
    plain: FluxDType = dtype if dtype == "bfloat16" else EXACT
    pipeline = load_pipeline(FluxCheckpoint.load(FLUX_CHECKPOINT), settings.model_copy(update={"dtype": plain}), "cpu")
    pipeline.transformer = wide_transformer(pipeline.transformer.config, width).to(pipeline.transformer.dtype)
    precision.place(pipeline, settings, "cpu")
    return pipeline, settings


def wide_transformer(config: Any, width: int) -> FluxTransformer2DModel:
    """Return a random transformer of the demo's inputs and number of blocks."""
    torch.manual_seed(0)
    axes = (HEAD // 8, HEAD * 7 // 16, HEAD * 7 // 16)
    changed = {"attention_head_dim": HEAD, "num_attention_heads": width // HEAD, "axes_dims_rope": axes}
    return FluxTransformer2DModel.from_config({**config, **changed}).eval().requires_grad_(False)


def step_ratios(
    dtypes: Sequence[FluxDType], width: int | None, *, size: int, rows: int, repeats: int
) -> list[list[float]]:
    """Return the speed of a step in each dtype over that in the first one, for each repeat.

    Args:
        dtypes: The dtypes to compare.
        width: Width of a random transformer; None for the demo's.
        size: Height and width of the images, in pixels.
        rows: Images per forward.
        repeats: Rounds over all dtypes.
    """
    checkpoint = FluxCheckpoint.load(FLUX_CHECKPOINT)
    steps = 4 if width else 20
    engines = []
    for dtype in dtypes:
        pipeline, settings = load(dtype, width)
        # `assemble` keeps no reference to the loop's variables: they are bound here.
        engines.append(
            SteppedDriver(lambda emit, each=pipeline, chosen=settings: assemble(each, checkpoint, chosen, emit))  # type: ignore[misc]
        )
    values = {"HEIGHT": size, "WIDTH": size, "STEPS": 100}
    requests = [parse({"PROMPT": f"{row}", "SEED": row, **values}, checkpoint, max_pixels=2**28) for row in range(rows)]
    seconds: list[list[float]] = [[] for _ in dtypes]
    for _ in range(repeats):
        for engine, measured in zip(engines, seconds, strict=True):
            jobs = engine.submit(requests)
            for _ in range(WARM_UP):
                engine.turn()
            started = time.perf_counter()
            for _ in range(steps):
                engine.turn()
            measured.append((time.perf_counter() - started) / steps)
            engine.cancel(jobs)
    return [[exact / mine for exact, mine in zip(seconds[0], each, strict=True)] for each in seconds]


def draw(dtype: FluxDType, count: int, sampling: Sampling) -> list[Image.Image]:
    """Return the demo's images for the prompts of `demo/evaluate_flux.py`, with its seeds."""
    pipeline, _ = load(dtype, None)
    pipeline.set_progress_bar_config(disable=True)
    asked = prompts(count, seed=0)
    images: list[Image.Image] = []
    for start in range(0, count, sampling.batch):
        batch = asked[start : start + sampling.batch]
        click.echo(f"{dtype}: image {start + 1} of {count}", err=True)
        images += pipeline(
            [caption for _, caption in batch],
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            max_sequence_length=pipeline.tokenizer_2.model_max_length,
            height=pipeline.vae.config.sample_size,
            width=pipeline.vae.config.sample_size,
            generator=[torch.Generator().manual_seed(start + index) for index in range(len(batch))],
        ).images
    return images


def adherence(images: Sequence[Image.Image]) -> dict[str, float]:
    """Return the share of right images by aspect, for the images that `draw` returns."""
    found: dict[str, list[bool]] = defaultdict(list)
    for (scene, _), image in zip(prompts(len(images), seed=0), images, strict=True):
        aspects = list(judge(scene, detect(image)))
        for aspect, right in [*aspects, ("everything", all(right for _, right in aspects))]:
            found[aspect].append(right)
    return {aspect: sum(right) / len(right) for aspect, right in found.items()}


def points_lost(exact: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Return the largest loss of an aspect, in percentage points."""
    return max(100 * (exact[aspect] - other[aspect]) for aspect in exact)


def speed_table(dtypes: Sequence[FluxDType], width: int, size: int, rows: int, repeats: int) -> None:
    """Print how many times as fast a step is in each dtype."""
    drawn = new_table("a step, against float32", *dtypes[1:])
    for named, chosen, pixels in (
        ("the demo's transformer", None, 128),
        (f"a random one of width {width}", width, size),
    ):
        ratios = step_ratios(dtypes, chosen, size=pixels, rows=rows, repeats=repeats)
        cells = [f"{statistics.median(each):.2f} x ({min(each):.2f} to {max(each):.2f})" for each in ratios[1:]]
        drawn.add_row(f"{named}, {rows} images of {pixels} x {pixels}", *cells)
    show(drawn, f"{torch.get_num_threads()} threads, medians of {repeats} rounds, with the least and the most")


def quality_table(dtypes: Sequence[FluxDType], count: int) -> bool:
    """Print adherence and distance in each dtype; return whether none loses too much."""
    sampling = Sampling()
    drawn = new_table("", *ASPECTS.values(), "PSNR, dB", "worst")
    exact: list[Image.Image] = []
    shares: list[dict[str, float]] = []
    for dtype in dtypes:
        images = draw(dtype, count, sampling)
        exact = exact or images
        shares.append(adherence(images))
        distances = [psnr(*pair) for pair in zip(exact, images, strict=True)]
        finite = [distance for distance in distances if distance < math.inf]
        near = (f"{statistics.mean(finite):.1f}", f"{min(finite):.1f}") if finite else ("", "")
        drawn.add_row(dtype, *(f"{shares[-1][aspect]:.1%}" for aspect in ASPECTS), *near)
    show(drawn, f"{count} images of {sampling.steps} steps, guidance {sampling.guidance:g}")
    return all(points_lost(shares[0], each) <= WANTED_POINTS for each in shares[1:])


@click.command(context_settings=SETTINGS)
@click.option("--dtype", "chosen", type=click.Choice(get_args(FluxDType)), multiple=True, default=DTYPES[1:])
@click.option("--count", type=COUNT, default=200, show_default=True, help="Images to judge in each dtype.")
@click.option("--width", type=COUNT, default=1024, show_default=True, help="Width of the random transformer.")
@click.option("--size", type=COUNT, default=256, show_default=True, help="Pixels per side of its images.")
@click.option("--rows", type=COUNT, default=4, show_default=True, help="Images per forward.")
@click.option("--repeats", type=COUNT, default=5, show_default=True)
@click.option("--threads", type=COUNT, help="CPU threads; torch's own number by default.")
@click.option("--only", type=click.Choice(["speed", "quality"]))
@click.option("--check", is_flag=True, help="Fail if a dtype loses more than two points of adherence.")
def main(
    chosen: tuple[str, ...],
    count: int,
    width: int,
    size: int,
    rows: int,
    repeats: int,
    threads: int | None,
    only: str | None,
    check: bool,
) -> None:
    """Compare FLUX's dtypes with float32 on this CPU."""
    if threads:
        torch.set_num_threads(threads)
    dtypes = (EXACT, *cast("tuple[FluxDType, ...]", chosen))
    right = True
    try:
        if only != "quality":
            speed_table(dtypes, width, size, rows, repeats)
        if only != "speed":
            right = quality_table(dtypes, count)
    except CheckpointError as error:
        fail(error)
    sys.stdout.flush()
    os._exit(int(check and not right))  # the engines' threads never end


if __name__ == "__main__":
    with torch.inference_mode():
        main()
