"""The demo's FLUX in bfloat16 through the engine, against FluxPipeline with the same seed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.load import build
from genserve_backend.flux.request import FluxRequest, parse
from genserve_backend.settings import FluxSettings
from gpu.driver import Turned
from gpu.flux_models import DEMO, call, load_demo
from gpu.part import Run

Pixels = npt.NDArray[np.int_]
SIZES = ((64, 160), (192, 64), (256, 128), (112, 128), (160, 64), (128, 144), (96, 96), (128, 112))
"""Height and width of the others in a batch."""


def images(run: Run) -> None:
    """Write how far images are apart: greatest difference in levels, and the share of values that differ."""
    checkpoint = FluxCheckpoint.read(DEMO)
    count, steps = (2, 2) if run.tiny else (4, 12)
    some = [
        _request(checkpoint, PROMPT=f"a {colour} circle", STEPS=steps, SEED=seed)
        for seed, colour in enumerate(("red", "blue", "green", "yellow")[:count])
    ]
    sizes = SIZES[:2] if run.tiny else SIZES
    others = [
        _request(
            checkpoint, PROMPT="a square", SEED=seed, STEPS=steps + seed % 3, GUIDANCE=seed, HEIGHT=high, WIDTH=wide
        )
        for seed, (high, wide) in enumerate(sizes)
    ]
    for dtype in ("bfloat16",) if run.tiny else ("bfloat16", "float32"):
        plain = load_demo(run.device, getattr(torch, dtype))
        alone = [_plain(plain, [request])[0] for request in some]
        again = [_plain(plain, [request])[0] for request in some]
        _write(run, dtype, "FluxPipeline, alone", "itself again", alone, again)
        _write(run, dtype, "FluxPipeline, alone", f"itself, {count} in a call", alone, _plain(plain, some))
        for padding, name in ((0.0, "sizes in turn"), (10.0, "sizes padded")):
            engine = _engine(run, checkpoint, dtype, padding)
            single = [_make(engine, [request])[0] for request in some]
            crowd = _make(engine, [*some, *others])[:count]
            _write(run, dtype, "FluxPipeline, alone", f"engine, alone, {name}", alone, single)
            _write(run, dtype, "FluxPipeline, alone", f"engine, batched, {name}", alone, crowd)
            _write(run, dtype, "engine, alone", f"engine, batched, {name}", single, crowd)


def _request(checkpoint: FluxCheckpoint, **values: Any) -> FluxRequest:
    return parse(values, checkpoint, max_pixels=2**20)


def _plain(pipeline: Any, requests: Sequence[FluxRequest]) -> list[Pixels]:
    return [np.asarray(image).astype(int) for image in call(pipeline, list(requests))]


def _engine(run: Run, checkpoint: FluxCheckpoint, dtype: str, padding: float) -> Turned:
    settings = FluxSettings.model_validate(
        {"model_path": checkpoint.path, "dtype": dtype, "max_padding": padding, "max_running": 32}
    )
    return Turned(lambda emit: build(settings, run.device, emit))


def _make(engine: Turned, requests: Sequence[FluxRequest]) -> list[Pixels]:
    results = engine.finish(engine.submit(requests))
    return [np.asarray(Image.open(io.BytesIO(result.image))).astype(int) for result in results]


def _write(run: Run, dtype: str, one: str, other: str, ours: Sequence[Pixels], theirs: Sequence[Pixels]) -> None:
    apart = [np.abs(left - right) for left, right in zip(ours, theirs, strict=True)]
    run.result(
        "images",
        dtype=dtype,
        one=one,
        other=other,
        images=len(apart),
        greatest=max(int(each.max()) for each in apart),
        share=float(np.mean([(each > 0).mean() for each in apart])),
        beyond_one=float(np.mean([(each > 1).mean() for each in apart])),
        mean=float(np.mean([each.mean() for each in apart])),
    )
