"""FLUX.1-dev's true shape: steps, kernels, whole images, VAE and text encoders."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from genserve_backend.flux import precision
from genserve_backend.flux.build import assemble
from genserve_backend.flux.prompts import PromptEncoder
from genserve_backend.settings import FluxSettings
from gpu.driver import SteppedDriver, ThreadedDriver
from gpu.flux_models import Flux, call, random_flux, step_flops
from gpu.part import Run
from gpu.variants import FLUX_VARIANTS, compile_blocks_by_size

STEPS = [(1024, 1), (512, 1), (512, 8), (1024, 4), (512, 4), (512, 2), (1024, 2), (1024, 8)]
MASKED_STEPS = [(512, 8), (1024, 2), (512, 2), (512, 4), (1024, 4), (1024, 8)]
"""Pixels per side, and rows of the forward."""
PROFILED = {(1024, 1), (512, 8)}
IMAGES = [(1024, 1), (512, 1), (512, 8)]
"""Pixels per side, and images at once."""
SMALLER = 16
"""Pixels by which every other image of a masked forward is narrower."""
KERNELS = 15
MAX_STEPS = 100
CACHE = 0.06
"""Threshold of skipped steps. MagCache decides by FLUX.1-dev's ratios, so random weights skip as many steps."""


def steps(run: Run) -> None:
    """Write the milliseconds of a step of the engine, by size and rows, and the most expensive kernels."""
    flux, engine = _engine(run, whole=False)
    seen: list[tuple[int, ...]] = []

    def look(_: Any, inputs: tuple[torch.Tensor]) -> None:
        seen.append(tuple(inputs[0].shape[:2]))

    flux.pipeline.transformer.x_embedder.register_forward_pre_hook(look)
    plain = [(64, 1), (96, 2)] if run.tiny else STEPS
    masked = [(96, 2)] if run.tiny else MASKED_STEPS
    cases = [(size, rows, False) for size, rows in plain] + [(size, rows, True) for size, rows in masked]
    for size, rows, is_masked in cases:
        named = {"variant": run.values["variant"], "size": size, "rows": rows, "masked": is_masked}
        is_profiled = (size, rows) in PROFILED or (run.tiny and is_masked)
        with run.isolate("flux-steps", **named):
            _step(run, flux, engine, seen, named, is_profiled=is_profiled)


def _step(
    run: Run,
    flux: Flux,
    engine: SteppedDriver,
    seen: list[tuple[int, ...]],
    named: dict[str, Any],
    *,
    is_profiled: bool,
) -> None:
    """Write the milliseconds of a step; `seen` has the rows and tokens of the forwards."""
    size, rows = named["size"], named["rows"]
    widths = [size - SMALLER * (named["masked"] and index % 2) for index in range(rows)]
    jobs = engine.submit(
        [
            flux.request(PROMPT=f"picture {index}", HEIGHT=size, WIDTH=width, STEPS=MAX_STEPS, SEED=index)
            for index, width in enumerate(widths)
        ]
    )
    try:
        run.clock.forget_peak()
        timing = run.clock.run(engine.turn, seconds=3.0)
        engine.receive()
        forward_rows, tokens = seen[-1]
        text_tokens = flux.checkpoint.max_sequence_length
        flops = step_flops(flux.pipeline.transformer, rows=forward_rows, image_tokens=tokens, text_tokens=text_tokens)
        run.result(
            "flux-steps",
            **named,
            first_ms=timing.first_ms,
            host_ms=timing.host_ms,
            device_ms=timing.device_ms,
            row_ms=timing.row_ms,
            spread=timing.spread,
            tflops=flops / timing.row_ms / 1e9,
            peak_mb=run.clock.memory()["peak_mb"],
            **({} if forward_rows == rows else {"reason": f"the forward had {forward_rows} rows"}),
        )
        if is_profiled:
            _kernels(run, engine.turn, named, row_ms=timing.row_ms)
    finally:
        engine.cancel(jobs)


def _engine(run: Run, *, whole: bool) -> tuple[Flux, SteppedDriver]:
    started = time.monotonic()
    flux = random_flux(run.device, tiny=run.tiny, whole=whole)
    run.clock.wait()
    built = time.monotonic()
    engine = SteppedDriver(lambda emit: _assembled(flux, run.values["variant"], emit))
    run.result(
        "starts", what="FLUX", built_s=built - started, assembled_s=time.monotonic() - built, **run.clock.memory()
    )
    return flux, engine


def _assembled(flux: Flux, variant: str, emit: Callable[[Any], None]) -> Any:
    flux.pipeline.vae.to(memory_format=torch.channels_last)  # like that of a loaded checkpoint
    options = FLUX_VARIANTS[variant].prepare(FluxSettings.model_fields, flux.pipeline)
    settings = FluxSettings.model_validate(
        {"model_path": flux.checkpoint.path, "max_batched_tokens": 2**17, "max_padding": 10.0, **options}
    )
    precision.quantize(flux.pipeline, settings, str(flux.pipeline.transformer.device))
    return assemble(flux.pipeline, flux.checkpoint, settings, emit)


def _kernels(run: Run, turn: Callable[[], Any], named: dict[str, Any], *, row_ms: float) -> None:
    """Write the most expensive kernels of two steps, and the device's idle share."""
    times = 2
    with run.clock.watch() as watched:
        for _ in range(times):
            turn()
    busy_ms = None if watched.busy_ms is None else watched.busy_ms / times
    idle = None if busy_ms is None else max(0.0, 1 - busy_ms / row_ms)
    run.result("flux-busy", **named, kernels=sum(watched.counts.values()) / times, busy_ms=busy_ms, idle=idle)
    whole = sum(watched.kernels.values()) or 1
    for place, (name, microseconds) in enumerate(watched.kernels.most_common(KERNELS), 1):
        run.result(
            "flux-kernels",
            **named,
            place=place,
            kernel=name,
            count=watched.counts[name] / times,
            ms=microseconds / 1000 / times,
            share=microseconds / whole,
        )


def images(run: Run) -> None:
    """Write the seconds of whole images with diffusers, the engine or both."""
    flux = random_flux(run.device, tiny=run.tiny, whole=True)
    count = 2 if run.tiny else 28
    cases = [(64, 1), (64, 2)] if run.tiny else IMAGES
    beside = run.values.get("beside")
    if beside:
        if beside == "diffusers-compile":
            compile_blocks_by_size(flux.pipeline)
        _time_images(run, flux, beside, cases, count, lambda requests: call(flux.pipeline, requests))
    if variant := run.values.get("variant"):
        engine = ThreadedDriver(lambda emit: _assembled(flux, variant, emit))
        _time_images(run, flux, f"engine, {variant}", cases, count, engine)
        _time_images(run, flux, f"engine, {variant}, CACHE {CACHE:g}", cases, count, engine, cache=CACHE)


def _time_images(
    run: Run,
    flux: Flux,
    contender: str,
    cases: list[tuple[int, int]],
    count: int,
    make: Callable[[Any], Any],
    *,
    cache: float = 0.0,
) -> None:
    for size, at_once in cases:
        named = {"contender": contender, "size": size, "at_once": at_once, "steps": count}
        requests = [
            flux.request(PROMPT=f"picture {seed}", HEIGHT=size, WIDTH=size, STEPS=count, SEED=seed, CACHE=cache)
            for seed in range(at_once)
        ]
        with run.isolate("flux-images", **named):
            run.clock.forget_peak()
            seconds, first_s = run.clock.seconds(partial(make, requests))
            peak_mb = run.clock.memory()["peak_mb"]
            an_image_s = seconds / at_once
            run.result("flux-images", **named, seconds=seconds, first_s=first_s, an_image_s=an_image_s, peak_mb=peak_mb)


@torch.inference_mode()
def codecs(run: Run) -> None:
    """Write the milliseconds of the VAE's decoder and of the text encoders."""
    flux = random_flux(run.device, tiny=run.tiny, whole=True)
    vae = flux.pipeline.vae
    for layout, name in ((torch.channels_last, "channels last"), (torch.contiguous_format, "contiguous")):
        vae.to(memory_format=layout)
        for size, count in [(64, 1)] if run.tiny else [(1024, 1), (512, 1), (512, 4)]:
            shape = (count, vae.config.latent_channels, size // 8, size // 8)
            latents = torch.randn(shape, device=run.device, dtype=torch.bfloat16)
            _codec(run, f"VAE decoder, {name}", f"{count} x {size} x {size}", partial(vae.decode, latents))
    encoder = PromptEncoder(flux.pipeline, max_sequence_length=flux.checkpoint.max_sequence_length, cache_bytes=0)
    for count in (1, 2) if run.tiny else (1, 4, 16):
        texts = [f"a picture of {number} things" for number in range(count)]
        _codec(run, "CLIP and T5", f"{count} prompts", partial(encoder.encode, texts))


def _codec(run: Run, what: str, detail: str, call: Callable[[], Any]) -> None:
    with run.isolate("flux-codecs", what=what, detail=detail):
        run.clock.forget_peak()
        timing = run.clock.run(call, seconds=2.0)
        run.result(
            "flux-codecs",
            what=what,
            detail=detail,
            first_ms=timing.first_ms,
            host_ms=timing.host_ms,
            device_ms=timing.device_ms,
            row_ms=timing.row_ms,
            peak_mb=run.clock.memory()["peak_mb"],
        )
