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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "demo"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import COUNT, FLUX_CHECKPOINT, SETTINGS, judge, new_table, show
from gpu.driver import SteppedDriver

DOCUMENTED = ("magcache", 0.12)
"""Method and threshold of the check."""
COMPARED = (
    ("magcache", 0.06),
    ("magcache", 0.12),
    ("magcache", 0.24),
    ("first-block", 0.05),
    ("first-block", 0.1),
    ("first-block", 0.2),
)
WITHOUT = ("magcache", 0.0)
METHODS = ("magcache", "first-block")
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


@dataclass
class Run:
    """The images of one setting, and the seconds that they took."""

    made: list[Made] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def adherence(self) -> float:
        """Share of images that show everything."""
        return statistics.mean(each.fitting for each in self.made)


@dataclass(frozen=True)
class Comparison:
    """A setting against no cache, for the same images."""

    gain: float
    """Ratio of throughputs."""
    skipped_steps: float
    """Mean per image."""
    median_db: float
    worst_db: float
    adherence: float
    adherence_without: float


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
) -> dict[tuple[str, float], Run]:
    """Return a run without a cache, then one for each method and threshold."""
    from evaluate_flux import prompts
    from genserve_backend.flux.build import assemble, load_pipeline
    from genserve_backend.flux.checkpoint import FluxCheckpoint
    from genserve_backend.flux.request import parse
    from genserve_backend.settings import FluxSettings

    checkpoint = FluxCheckpoint.load(FLUX_CHECKPOINT)
    pipeline = load_pipeline(checkpoint, FluxSettings(model_path=FLUX_CHECKPOINT), "cpu")
    asked = prompts(images, seed=0)
    runs = [WITHOUT, *compared]

    def engine(method: str) -> SteppedDriver:
        values = {"model_path": FLUX_CHECKPOINT, "cache_method": method, "max_running": concurrency}
        settings = FluxSettings.model_validate(values)
        return SteppedDriver(lambda emit: assemble(pipeline, checkpoint, settings, emit))

    engines = {method: engine(method) for method in {run[0] for run in runs}}
    found = {run: Run() for run in runs}

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
            found[run].seconds += time.monotonic() - started
            found[run].made += [opened(result, asked[start + index][0]) for index, result in enumerate(results)]
    return found


def compare(plain: Run, cached: Run) -> Comparison:
    """Compare a run with the run without a cache."""
    ratios = [psnr_db(one.pixels, other.pixels) for one, other in zip(plain.made, cached.made, strict=True)]
    return Comparison(
        gain=plain.seconds / cached.seconds,
        skipped_steps=statistics.mean(each.skipped_steps for each in cached.made),
        median_db=statistics.median(ratios),
        worst_db=min(ratios),
        adherence=cached.adherence,
        adherence_without=plain.adherence,
    )


def broken_promises(found: Comparison) -> list[str]:
    """Return a line for each promise of the documented setting that does not hold."""
    broken = []
    if found.gain < MIN_GAIN:
        broken.append(f"throughput {found.gain:.2f} x, not {MIN_GAIN:g} x")
    if found.median_db < MIN_PSNR_DB:
        broken.append(f"PSNR {found.median_db:.1f} dB, not {MIN_PSNR_DB:g} dB")
    if found.adherence < found.adherence_without - MAX_ADHERENCE_LOSS:
        broken.append(f"adherence {found.adherence:.1%}, not within two points of {found.adherence_without:.1%}")
    return broken


@click.command(context_settings=SETTINGS)
@click.option("--images", type=COUNT, default=240, show_default=True)
@click.option("--steps", type=COUNT, default=28, show_default=True)
@click.option("--concurrency", type=COUNT, default=8, show_default=True, help="Images in a forward.")
@click.option("--setting", type=(click.Choice(METHODS), float), multiple=True, help="Method and threshold; repeatable.")
@click.option("--check", is_flag=True, help="Only the documented setting; fail unless it keeps its promises.")
def main(images: int, steps: int, concurrency: int, setting: tuple[tuple[str, float], ...], *, check: bool) -> None:
    """Compare images with skipped steps with the same images without."""
    runs = measure([DOCUMENTED] if check else setting or COMPARED, images, steps, concurrency)
    plain, broken = runs[WITHOUT], list[str]()
    table = new_table("Method", "CACHE", "Steps skipped", "Throughput", "PSNR, median", "PSNR, worst", "Adherence")
    table.add_row("none", "0", "0", "1.00 x", "", "", f"{plain.adherence:.1%}")
    for (method, threshold), run in list(runs.items())[1:]:
        found = compare(plain, run)
        qualities = (f"{found.median_db:.1f} dB", f"{found.worst_db:.1f} dB", f"{found.adherence:.1%}")
        table.add_row(method, f"{threshold:g}", f"{found.skipped_steps:.1f}", f"{found.gain:.2f} x", *qualities)
        if (method, threshold) == DOCUMENTED:
            broken += broken_promises(found)
    show(table, f"{images} images of {steps} steps, {concurrency} at a time")
    judge(broken, check=check)


if __name__ == "__main__":
    main()
