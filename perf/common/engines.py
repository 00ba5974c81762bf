"""FLUX engines in the study's own process, timed in turn."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from common.command import FLUX_CHECKPOINT
from genserve_backend.flux.build import build
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.request import FluxRequest, parse
from genserve_backend.settings import FluxSettings
from gpu.driver import SteppedDriver

Pixels = npt.NDArray[np.int_]
MAX_PIXELS = 2**28


def flux_engine(**settings: Any) -> SteppedDriver:
    """Return an engine for the demo's checkpoint on the CPU."""
    given = FluxSettings(model_path=FLUX_CHECKPOINT, **settings)
    return SteppedDriver(lambda emit: build(given, "cpu", emit))


def flux_requests(sizes: Sequence[tuple[int, int]], *, steps: int, seed: int = 0, **values: Any) -> list[FluxRequest]:
    """Return a request per size, height and width in pixels, each with its own prompt and seed."""
    checkpoint = FluxCheckpoint.load(FLUX_CHECKPOINT)
    given = [
        {"PROMPT": f"picture {seed + number}", "SEED": seed + number, "HEIGHT": height, "WIDTH": width, "STEPS": steps}
        for number, (height, width) in enumerate(sizes)
    ]
    return [parse({**each, **values}, checkpoint, max_pixels=MAX_PIXELS) for each in given]


def files(engine: SteppedDriver, requests: Sequence[FluxRequest]) -> list[bytes]:
    """Submit all requests at once; return their image files."""
    return [result.image for result in engine.finish(engine.submit(requests))]


def levels(file: bytes) -> Pixels:
    """Return the pixels of an image file."""
    return np.asarray(Image.open(io.BytesIO(file))).astype(int)


def image_seconds(
    engines: Mapping[str, SteppedDriver], cases: Mapping[str, Sequence[FluxRequest]], *, rounds: int
) -> dict[str, dict[str, float]]:
    """Return the seconds per image by case and engine: medians of `rounds`, after one that does not count.

    The engines take turns, so that a change of the machine's load meets all of them.
    """
    seconds: dict[str, dict[str, list[float]]] = {case: {name: [] for name in engines} for case in cases}
    for number in range(rounds + 1):
        for case, requests in cases.items():
            for name, engine in engines.items():
                started = time.monotonic()
                files(engine, requests)
                if number:
                    seconds[case][name].append((time.monotonic() - started) / len(requests))
    return {
        case: {name: statistics.median(some) for name, some in of_case.items()} for case, of_case in seconds.items()
    }
