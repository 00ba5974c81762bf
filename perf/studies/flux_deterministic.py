"""FLUX_DETERMINISTIC on this CPU: images that depend on what runs beside them, with and without it, and its price.

The engines with and without the setting take turns in one process. `--check` fails if an image of the deterministic
engine has other bytes in a crowd than alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import COUNT, SETTINGS, fail, judge, new_table, show
from common.script import run_script
from genserve.serve.options import ServeError
from genserve_backend.worker.link import worker_environment

DTYPES = ("float32", "bfloat16")
CASES = {
    "128 x 128, 1 at a time": [(128, 128)],
    "128 x 128, 8 at a time": [(128, 128)] * 8,
    "256 x 256, 4 at a time": [(256, 256)] * 4,
    "5 near sizes, 8 at a time": ([(112, 128), (128, 112), (128, 128), (128, 144), (144, 128)] * 2)[:8],
}
STEPS = 10
BATCHED = "batched"


def measure(dtype: str, rounds: int) -> dict[str, Any]:
    """Return the seconds per image, and the differences between alone and in a crowd, by engine."""
    from common.engines import files, flux_engine, flux_requests, image_seconds, levels

    # Without a cache, prompts are encoded again beside others.
    engines = {
        name: flux_engine(dtype=dtype, deterministic=name != BATCHED, prompt_cache_bytes=0)
        for name in (BATCHED, "deterministic")
    }
    cases = {name: flux_requests(sizes, steps=STEPS) for name, sizes in CASES.items()}
    seconds = image_seconds(engines, cases, rounds=rounds)
    changed = {}
    for name, engine in engines.items():
        pairs = [
            (files(engine, [request])[0], beside)
            for requests in cases.values()
            if len(requests) > 1
            for request, beside in zip(requests, files(engine, requests), strict=True)
        ]
        changed[name] = {
            "images": len(pairs),
            "other_bytes": sum(one != other for one, other in pairs),
            "levels": max(int(abs(levels(one) - levels(other)).max()) for one, other in pairs),
        }
    return {"seconds": seconds, "changed": changed}


@click.command(context_settings=SETTINGS)
@click.option("--rounds", type=COUNT, default=5, show_default=True, help="Rounds of each case; medians count.")
@click.option("--threads", type=COUNT, help="CPU threads of an engine; by default torch's.")
@click.option("--check", is_flag=True, help="Exit with 1 if an image depends on what runs beside it.")
@click.option("--one", type=click.Choice(DTYPES), hidden=True)
def main(rounds: int, threads: int | None, check: bool, one: str | None) -> None:
    """Compare deterministic images with batched ones."""
    if one:
        print(json.dumps(measure(one, rounds)), flush=True)
        os._exit(0)  # the engines' threads never end
    os.environ.update(worker_environment() | ({"OMP_NUM_THREADS": str(threads)} if threads else {}))
    speeds = new_table(f"{STEPS} steps", "Batched, s/image", "Deterministic, s/image", "Slower")
    images = new_table("Alone against in a crowd", "Images", "With other bytes", "Largest difference, levels")
    broken = []
    for dtype in DTYPES:
        try:
            found = json.loads(run_script(Path(__file__), "--one", dtype, "--rounds", str(rounds)))
        except (ServeError, subprocess.TimeoutExpired) as error:
            fail(error)
        for case, seconds in found["seconds"].items():
            batched, deterministic = seconds[BATCHED], seconds["deterministic"]
            ratio = f"{deterministic / batched:.2f} x"
            speeds.add_row(f"{dtype}, {case}", f"{batched:.3f}", f"{deterministic:.3f}", ratio)
        for name, changed in found["changed"].items():
            counts = [str(changed[key]) for key in ("images", "other_bytes", "levels")]
            images.add_row(f"{dtype}, {name}", *counts)
        if other := found["changed"]["deterministic"]["other_bytes"]:
            broken.append(f"{dtype}: {other} deterministic images depend on what runs beside them")
    show(speeds)
    show(images)
    judge(broken, check=check)


if __name__ == "__main__":
    main()
