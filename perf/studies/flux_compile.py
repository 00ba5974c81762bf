"""FLUX_COMPILE on this CPU: speed, number of graphs, differences between images, and the time of a start.

The engines with and without compiled blocks take turns in one process. `--check` fails if 50 mixed batches compile
anything, if a shape has no compiled code, or if a float32 image differs by more than one level of 255.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import COUNT, SETTINGS, fail, judge, new_table, show
from common.script import run_script
from genserve.serve.options import ServeError
from genserve_backend.worker.link import worker_environment

CASES = ((128, 1), (128, 4), (256, 1), (256, 4), (512, 1))
"""Pixels per side, and images at a time."""
STEPS = 10
MIXED_BATCHES = 50
MIXED_SIDES = range(64, 400, 16)
MAX_LEVELS = 1
EAGER = "eager"
STARTS = {"eager": EAGER, "compiled, empty folder": "cold", "compiled, second start": "warm"}


def measure(dtype: str, rounds: int, folder: str) -> dict[str, Any]:
    """Return the seconds per image, the graphs and the differences."""
    import torch

    from common.engines import files, flux_engine, flux_requests, image_seconds, levels
    from genserve_backend.flux.compilation import WatchedAttention

    def graphs() -> int:
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    compiled = flux_engine(dtype=dtype, compiled=True, compile_cache=folder)
    engines = {EAGER: flux_engine(dtype=dtype), "compiled": compiled}
    made = graphs()
    cases = {
        f"{size} x {size}, {count} at a time": flux_requests([(size, size)] * count, steps=STEPS)
        for size, count in CASES
    }
    seconds = image_seconds(engines, cases, rounds=rounds)
    differences = [
        int(abs(levels(one) - levels(other)).max())
        for requests in cases.values()
        for one, other in zip(*(files(engine, requests) for engine in engines.values()), strict=True)
    ]
    draw = random.Random(1)
    for number in range(MIXED_BATCHES):
        sizes = [(draw.choice(MIXED_SIDES), draw.choice(MIXED_SIDES)) for _ in range(draw.randint(1, 8))]
        files(compiled, flux_requests(sizes, steps=1, seed=number, NEGATIVE_PROMPT=draw.choice(["", "dark"])))
    attention = compiled.engine._denoiser._transformer.transformer_blocks[0].attn.processor
    if not isinstance(attention, WatchedAttention):
        raise TypeError("the blocks are not compiled")
    return {
        "seconds": seconds,
        "graphs": made,
        "graphs_after": graphs(),
        "eager_shapes": attention.eager_shapes,
        "levels": max(differences),
    }


def start(dtype: str, folder: str) -> float:
    """Return the seconds to build an engine."""
    from common.engines import flux_engine

    settings = {} if folder == EAGER else {"compiled": True, "compile_cache": folder}
    started = time.monotonic()
    flux_engine(dtype=dtype, **settings)
    return time.monotonic() - started


@click.command(context_settings=SETTINGS)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--rounds", type=COUNT, default=5, show_default=True, help="Rounds of each case; medians count.")
@click.option("--threads", type=COUNT, help="CPU threads of an engine; by default torch's.")
@click.option("--check", is_flag=True, help="Exit with 1 if a promise does not hold.")
@click.option("--part", type=(click.Choice(["images", "start"]), str), hidden=True)
def main(dtype: str, rounds: int, threads: int | None, check: bool, part: tuple[str, str] | None) -> None:
    """Compare compiled blocks with eager ones."""
    if part:
        name, folder = part
        print(json.dumps(measure(dtype, rounds, folder) if name == "images" else start(dtype, folder)), flush=True)
        os._exit(0)  # the engines' threads never end
    os.environ.update(worker_environment() | ({"OMP_NUM_THREADS": str(threads)} if threads else {}))
    try:
        with tempfile.TemporaryDirectory() as folder:
            starts = {}
            for title, kind in STARTS.items():
                chosen = EAGER if kind == EAGER else folder
                starts[title] = json.loads(run_script(Path(__file__), "--part", "start", chosen, "--dtype", dtype))
            options = ["--dtype", dtype, "--rounds", str(rounds)]
            found = json.loads(run_script(Path(__file__), "--part", "images", folder, *options))
    except (ServeError, subprocess.TimeoutExpired) as error:
        fail(error)
    table = new_table(f"{dtype}, {STEPS} steps", "Eager, s/image", "Compiled, s/image", "Faster")
    for case, seconds in found["seconds"].items():
        eager, compiled = seconds[EAGER], seconds["compiled"]
        table.add_row(case, f"{eager:.3f}", f"{compiled:.3f}", f"{eager / compiled:.2f} x")
    show(table)
    table = new_table("Start", "Seconds")
    for title, value in starts.items():
        table.add_row(title, f"{value:.1f}")
    show(table)
    print(
        f"graphs: {found['graphs']} at the start, {found['graphs_after']} after {MIXED_BATCHES} mixed batches; "
        f"shapes without code: {found['eager_shapes']}; largest difference: {found['levels']} levels"
    )
    broken = []
    if found["graphs_after"] != found["graphs"]:
        broken.append(f"{found['graphs_after'] - found['graphs']} graphs were made after the start")
    if found["eager_shapes"]:
        broken.append(f"{found['eager_shapes']} shapes had no compiled code")
    if dtype == "float32" and found["levels"] > MAX_LEVELS:
        broken.append(f"an image differs by {found['levels']} levels")
    judge(broken, check=check)


if __name__ == "__main__":
    main()
