"""Skipped steps: throughput, difference from images without a cache, and adherence to the prompt, by threshold.

Drives the engine without a server, with the demo's checkpoint and prompts that its training never saw. The documented
threshold was chosen with it. ``--check`` fails unless it keeps its promises.
"""

from __future__ import annotations

import io
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from PIL import Image

PERF = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PERF), str(PERF.parent / "demo")]

from common.command import COUNT, FLUX_CHECKPOINT, SETTINGS, judge, new_table, show
from gpu.driver import SteppedDriver

DOCUMENTED = ("magcache", 0.06)
"""Method and threshold of the check."""
COMPARED = (("magcache", 0.03), ("magcache", 0.06), ("magcache", 0.12), ("magcache", 0.24))
COMPARED_FIRST_BLOCK = (("first-block", 0.05), ("first-block", 0.1), ("first-block", 0.2))
MIN_GAIN = 1.4
MIN_PSNR_DB = 30.0
MAX_ADHERENCE_LOSS = 0.02
CHUNK = 40
"""Images of each setting in turn."""


class Made(NamedTuple):
    """One image of a run."""

    pixels: Any
    skipped_steps: int
    fitting: bool
    """True if everything that the prompt asks for is in the image."""


def psnr_db(one: Any, other: Any) -> float:
    """Return the peak signal-to-noise ratio of two images with levels 0 to 255, in dB; infinite for equal images."""
    error = float(np.mean((one.astype(float) - other.astype(float)) ** 2))
    return 10 * float(np.log10(255**2 / error)) if error else float("inf")


def fits(scene: Any, image: Image.Image) -> bool:
    """Return whether an image shows everything of its scene."""
    from shapes.detection import detect
    from shapes.judging import judge as judge_image

    return all(right for _, right in judge_image(scene, detect(image)))


def opened(result: Any, scene: Any) -> Made:
    """Decode and judge a result."""
    image = Image.open(io.BytesIO(result.image)).convert("RGB")
    return Made(np.asarray(image), result.skipped_steps, fits(scene, image))


def measure(
    compared: Sequence[tuple[str, float]], images: int, steps: int, concurrency: int
) -> dict[tuple[str, float], tuple[list[Made], float]]:
    """Return images and seconds by method and threshold; threshold 0 is without a cache."""
    from evaluate_flux import prompts
    from genserve_backend.flux.build import assemble, load_pipeline
    from genserve_backend.flux.checkpoint import FluxCheckpoint
    from genserve_backend.flux.request import parse
    from genserve_backend.settings import FluxSettings

    checkpoint = FluxCheckpoint.load(FLUX_CHECKPOINT)
    pipeline = load_pipeline(checkpoint, FluxSettings(model_path=FLUX_CHECKPOINT), "cpu")
    asked = prompts(images, seed=0)
    runs = [("magcache", 0.0), *compared]

    def engine(method: str) -> SteppedDriver:
        values = {"model_path": FLUX_CHECKPOINT, "cache_method": method, "max_running": concurrency}
        settings = FluxSettings.model_validate(values)
        return SteppedDriver(lambda emit: assemble(pipeline, checkpoint, settings, emit))

    engines = {method: engine(method) for method in {run[0] for run in runs}}
    found: dict[tuple[str, float], tuple[list[Made], float]] = {run: ([], 0.0) for run in runs}

    def requests(run: tuple[str, float], start: int) -> list[Any]:
        method: Any = run[0]
        return [
            parse(
                {"PROMPT": caption, "SEED": start + index, "STEPS": steps, "CACHE": run[1]},
                checkpoint,
                max_pixels=2**20,
                cache_method=method,
            )
            for index, (_, caption) in enumerate(asked[start : start + CHUNK])
        ]

    for run in runs:
        driver = engines[run[0]]
        driver.finish(driver.submit(requests(run, 0)[:concurrency]))  # one-time setup
    for start in range(0, images, CHUNK):
        for run in runs:
            click.echo(f"images {start} to {min(start + CHUNK, images)}: {run[0]} {run[1]:g}", err=True)
            driver, batch = engines[run[0]], requests(run, start)
            started = time.monotonic()
            results = driver.finish(driver.submit(batch))
            seconds = time.monotonic() - started
            made, before = found[run]
            made += [opened(result, asked[start + index][0]) for index, result in enumerate(results)]
            found[run] = (made, before + seconds)
    return found


@click.command(context_settings=SETTINGS)
@click.option("--images", type=COUNT, default=240, show_default=True)
@click.option("--steps", type=COUNT, default=28, show_default=True)
@click.option("--concurrency", type=COUNT, default=8, show_default=True, help="Images in a forward.")
@click.option("--check", is_flag=True, help="Only the documented setting; fail unless it keeps its promises.")
def main(images: int, steps: int, concurrency: int, *, check: bool) -> None:
    """Compare images with skipped steps with the same images without."""
    found = measure([DOCUMENTED] if check else [*COMPARED, *COMPARED_FIRST_BLOCK], images, steps, concurrency)
    (plain, plain_s), *_ = found.values()
    fitting = statistics.mean(made.fitting for made in plain)
    table = new_table("Method", "CACHE", "Steps skipped", "Throughput", "PSNR, median", "PSNR, worst", "Adherence")
    table.add_row("none", "0", "0", "1.00 x", "", "", f"{fitting:.1%}")
    broken: list[str] = []
    for run, (made, seconds) in list(found.items())[1:]:
        gain = plain_s / seconds
        ratios = [psnr_db(one.pixels, other.pixels) for one, other in zip(plain, made, strict=True)]
        adherence = statistics.mean(each.fitting for each in made)
        median = statistics.median(ratios)
        skipped = statistics.mean(each.skipped_steps for each in made)
        cells = [f"{skipped:.1f}", f"{gain:.2f} x", f"{median:.1f} dB", f"{min(ratios):.1f} dB", f"{adherence:.1%}"]
        table.add_row(run[0], f"{run[1]:g}", *cells)
        if run == DOCUMENTED:
            if gain < MIN_GAIN:
                broken.append(f"throughput {gain:.2f} x, not {MIN_GAIN:g} x")
            if median < MIN_PSNR_DB:
                broken.append(f"PSNR {median:.1f} dB, not {MIN_PSNR_DB:g} dB")
            if adherence < fitting - MAX_ADHERENCE_LOSS:
                broken.append(f"adherence {adherence:.1%}, more than {MAX_ADHERENCE_LOSS:.0%} below {fitting:.1%}")
    show(table, f"{images} images of {steps} steps, {concurrency} at a time")
    judge(broken, check=check)


if __name__ == "__main__":
    main()
