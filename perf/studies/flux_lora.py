"""LoRA adapters mixed in a batch: throughput against the same load without, and against batches split by adapter.

Drives the engine without a server on the demo checkpoint. The load mixes requests with four adapters of one rank, each
its own, and requests with none. The split runs the same engine with forwards of one adapter only, in turn.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import COUNT, FLUX_CHECKPOINT, SETTINGS, fail, judge, new_table, show
from common.script import run_script
from genserve.serve.options import ServeError

TRAINED = FLUX_CHECKPOINT.parent / "loras" / "neon"
WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
ADAPTERS = ("trained", "random-1", "random-2", "random-3")
VARIANTS = ("none", "mixed", "split")
STEPS = 20
TIMEOUT_S = 600
LEAST_OF_NONE = 0.8
"""Throughput with adapters to throughput without, at least."""
LEAST_OF_SPLIT = 1.5
"""Throughput of mixed batches to throughput of split ones, at least."""


def write_adapters(folder: Path, trained: Path) -> None:
    """Write the trained adapter, and random ones with the shapes of its tensors."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copy(trained, folder / f"{ADAPTERS[0]}.safetensors")
    tensors = load_file(trained)
    for seed, name in enumerate(ADAPTERS[1:]):
        draw = torch.Generator().manual_seed(seed)
        drawn = {
            key: (torch.randn(tensor.shape, generator=draw) * tensor.float().std()).to(tensor.dtype)
            for key, tensor in tensors.items()
        }
        save_file(drawn, folder / f"{name}.safetensors")


def split_by_adapter(choose: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Return a choice of images for the next forward that keeps adapters apart: those of the image that is due."""

    def choose_one(policy: Any, running: list[Any], waiting: list[Any], *, tick: int, **limits: Any) -> list[Any]:
        due = max(running, key=lambda image: tick - image.ran_at)
        alike = [image for image in running if image.request.lora == due.request.lora]
        return choose(policy, alike, waiting, tick=tick, **limits)

    return choose_one


def run_one(variant: str, folder: Path, requests: int, concurrency: int) -> None:
    """Drive the engine in this process's main thread; print images per second and the mean batch size."""
    from genserve_backend.flux.build import build
    from genserve_backend.flux.checkpoint import FluxCheckpoint
    from genserve_backend.flux.policy.urgency import Urgency
    from genserve_backend.flux.request import parse
    from genserve_backend.settings import FluxSettings
    from genserve_backend.worker.messages import Done, Event, Failed, Submit

    if variant == "split":
        Urgency.choose = split_by_adapter(Urgency.choose)  # type: ignore[method-assign]
    checkpoint = FluxCheckpoint.load(FLUX_CHECKPOINT)
    events: SimpleQueue[Event] = SimpleQueue()
    path = None if variant == "none" else folder
    settings = FluxSettings(model_path=FLUX_CHECKPOINT, lora_path=path, max_running=concurrency)
    engine = build(settings, "cpu", events.put)
    choices = [[], *([{"name": name, "weight": 1.0}] for name in ADAPTERS)]
    measured: list[dict[str, float]] = []

    def submit(job: int) -> None:
        lora = json.dumps([] if variant == "none" else choices[job % len(choices)])
        values = {"PROMPT": f"picture {job}", "STEPS": STEPS, "SEED": job, "LORA": lora}
        request = parse(values, checkpoint, max_pixels=2**28)
        engine.submit(Submit(job, str(job), request, time.monotonic() + TIMEOUT_S))

    def drive() -> None:
        warm_up, total = 2 * concurrency, 2 * concurrency + requests
        for job in range(concurrency):
            submit(job)
        sent, ended, started, batches = concurrency, 0, 0.0, []
        while ended < total:
            event = events.get()
            if not isinstance(event, (Done, Failed)):
                continue
            if isinstance(event, Failed):
                raise event.error
            ended += 1
            batches.append(event.result.mean_batch_size)
            started = started or (time.monotonic() if ended == warm_up else 0.0)
            if sent < total:
                submit(sent)
                sent += 1
        rate = requests / (time.monotonic() - started)
        measured.append({"rate": rate, "batch": statistics.mean(batches[warm_up:])})

    driver = threading.Thread(target=drive)
    driver.start()
    while driver.is_alive():
        engine.turn()
    if not measured:
        raise SystemExit("the load was not answered")
    print(json.dumps(measured[0]), flush=True)
    os._exit(0)  # the engine's threads never end


@click.command(context_settings=SETTINGS)
@click.option("--requests", type=COUNT, default=80, show_default=True, help="Measured images of a run.")
@click.option("--concurrency", type=COUNT, default=5, show_default=True, help="Images in flight.")
@click.option("--repeats", type=COUNT, default=3, show_default=True, help="Runs of each; medians count.")
@click.option(
    "--trained",
    type=click.Path(exists=True, path_type=Path),
    default=TRAINED,
    show_default=True,
    help="Folder of the trained adapter.",
)
@click.option("--check", is_flag=True, help=f"Fail below {LEAST_OF_NONE} of none, or {LEAST_OF_SPLIT} times split.")
@click.option("--one", type=(click.Choice(VARIANTS), click.Path(path_type=Path)), hidden=True)
def main(
    requests: int, concurrency: int, repeats: int, trained: Path, check: bool, one: tuple[str, Path] | None
) -> None:
    """Compare a load of four adapters and none with the same load without, and with forwards of one adapter each."""
    if one:
        run_one(*one, requests, concurrency)
        return
    rates: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    batches: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory(prefix="genserve-lora-") as folder:
        write_adapters(Path(folder), trained / WEIGHTS_FILE)
        options = ["--requests", str(requests), "--concurrency", str(concurrency), "--trained", str(trained)]
        for _ in range(repeats):
            for variant in VARIANTS:
                try:
                    run = json.loads(run_script(Path(__file__), "--one", variant, folder, *options))
                except (ServeError, subprocess.TimeoutExpired) as error:
                    fail(error)
                rates[variant].append(run["rate"])
                batches[variant].append(run["batch"])
    medians = {variant: statistics.median(measured) for variant, measured in rates.items()}
    table = new_table("Load", "Images/s", "of none", "Mean batch")
    for variant, median in medians.items():
        batch = statistics.median(batches[variant])
        table.add_row(variant, f"{median:.1f}", f"{median / medians['none']:.2f}", f"{batch:.1f}")
    show(table)
    of_none, of_split = medians["mixed"] / medians["none"], medians["mixed"] / medians["split"]
    click.echo(f"mixed is {of_none:.2f} of none, and {of_split:.2f} times split")
    broken = []
    if of_none < LEAST_OF_NONE:
        broken.append(f"mixed adapters reach {of_none:.2f} of the load without, promised {LEAST_OF_NONE}")
    if of_split < LEAST_OF_SPLIT:
        broken.append(f"mixed adapters reach {of_split:.2f} times split batches, promised {LEAST_OF_SPLIT}")
    judge(broken, check=check)


if __name__ == "__main__":
    main()
