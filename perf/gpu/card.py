"""The GPU itself: versions, and the rates of matrix products and copies."""

from __future__ import annotations

from typing import Any

import torch

from common import machine
from gpu.clock import Clock, rotating
from gpu.part import Run

PACKAGES = ("diffusers", "transformers", "tokenizers", "numpy", "triton")
SHAPES = {
    "FLUX 512, one image": [(1536, 3072, 3072), (1536, 3072, 12288), (1536, 15360, 3072)],
    "FLUX 1024, one image": [(4608, 3072, 3072), (4608, 3072, 12288), (4608, 15360, 3072)],
    "FLUX 1024, four images": [(18432, 3072, 3072), (18432, 3072, 12288), (18432, 15360, 3072)],
    "Qwen3 0.6B, 16,384 tokens": [(16384, 1024, 4096), (16384, 1024, 6144), (16384, 3072, 1024)],
    "Qwen3 4B, 8,192 tokens": [(8192, 2560, 6144), (8192, 2560, 19456), (8192, 9728, 2560)],
}
"""Rows, width and outputs of the models' matrix products."""


def card(run: Run) -> None:
    """Write versions and rates."""
    run.result("card", **versions(run.clock))
    sizes = (256, 2**20) if run.tiny else (8192, 2**32)
    bfloat16_rate(run, sizes[0])
    copy_rate(run, sizes[1])
    float8_rate(run, sizes[0])
    if run.values.get("shapes"):
        for what, products in SHAPES.items():
            for rows, width, outputs in products:
                shape = (rows // 64, width // 64, outputs // 64) if run.tiny else (rows, width, outputs)
                ms, tflops = product_rate(run.clock, *shape)
                run.result("matrices", what=what, rows=shape[0], width=shape[1], outputs=shape[2], ms=ms, tflops=tflops)


def versions(clock: Clock) -> dict[str, Any]:
    """Return versions and device properties; None for values that a CPU lacks."""
    found: dict[str, Any] = {**machine.versions(PACKAGES), "torch": torch.__version__}
    found |= dict.fromkeys(("cuda", "cudnn", "driver", "device", "capability", "memory_gib", "multiprocessors"))
    if clock.on_gpu:
        properties = torch.cuda.get_device_properties(clock.device)
        found |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "driver": next(iter(machine.gpus("driver_version")), None),
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": properties.total_memory / 2**30,
            "multiprocessors": properties.multi_processor_count,
        }
    return found


def product_rate(clock: Clock, rows: int, width: int, outputs: int) -> tuple[float, float]:
    """Return the milliseconds and TFLOP/s of a product in bfloat16 on random data."""
    pairs = [
        (
            torch.randn(rows, width, device=clock.device, dtype=torch.bfloat16),
            torch.randn(outputs, width, device=clock.device, dtype=torch.bfloat16),
        )
        for _ in range(3)
    ]
    pair = rotating(pairs)

    def multiply() -> None:
        one, other = pair()
        torch.nn.functional.linear(one, other)

    ms = clock.run(multiply, seconds=0.5, most=50).ms
    return ms, 2 * rows * width * outputs / ms / 1e9


def bfloat16_rate(run: Run, width: int) -> None:
    """Write the rate of large products in bfloat16."""
    ms, tflops = product_rate(run.clock, width, width, width)
    run.result("rates", what="bfloat16", detail=f"{width} x {width} x {width}", ms=ms, tflops=tflops)


def copy_rate(run: Run, count: int) -> None:
    """Write the rate of a copy from device memory to device memory, bytes read and written counted."""
    buffers = [torch.empty(count, device=run.clock.device, dtype=torch.uint8).random_() for _ in range(3)]
    source = rotating(buffers[:2])

    def copy() -> None:
        buffers[2].copy_(source())

    ms = run.clock.run(copy, seconds=0.5, most=50).ms
    run.result("rates", what="copy", detail=f"{count:,} bytes", ms=ms, gb_per_s=2 * count / ms / 1e6)


def float8_rate(run: Run, width: int) -> None:
    """Write the rate of large products in float8 with a scale per row and output, if the GPU supports it."""
    device = run.clock.device
    row = {"what": "float8", "detail": f"{width} x {width} x {width}, a scale per row and output"}
    try:
        one, other = (torch.randn(width, width, device=device).clamp(-4, 4).to(torch.float8_e4m3fn) for _ in range(2))
        scales = torch.ones(width, 1, device=device)

        def multiply() -> None:
            torch._scaled_mm(
                one, other.t(), scale_a=scales, scale_b=scales.t(), out_dtype=torch.bfloat16, use_fast_accum=True
            )

        ms = run.clock.run(multiply, seconds=0.5, most=50).ms
    except (RuntimeError, NotImplementedError, ValueError) as error:
        run.result("rates", **row, ms=None, tflops=None, reason=str(error).splitlines()[0])
        return
    run.result("rates", **row, ms=ms, tflops=2 * width**3 / ms / 1e9)
