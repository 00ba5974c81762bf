"""Gain of padding: images of different sizes in one padded forward, against forwards of one size in turn.

Drives the engine without a server with several values of `max_padding`, and prints images per second relative to turns.
The default of `max_padding` was chosen with it.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import COUNT, FLUX_CHECKPOINT, SETTINGS, fail, new_table, show
from common.script import run_script
from genserve.serve.options import ServeError

MIXES = {
    "near": [(112, 128), (128, 112), (128, 128), (128, 144), (144, 128)],
    "two": [(128, 128), (256, 256)],
    "many": [(64, 64), (64, 128), (128, 128), (192, 128), (192, 192), (256, 192), (256, 256)],
}
PADDINGS = (0.0, 0.25, 0.5, 1.0)
STEPS = 10
TIMEOUT_S = 600


def run_one(mix: str, padding: float, requests: int, concurrency: int) -> None:
    """Drive the engine in this process's main thread; print images per second."""
    from genserve_backend.flux.build import build
    from genserve_backend.flux.checkpoint import FluxCheckpoint
    from genserve_backend.flux.request import parse
    from genserve_backend.settings import FluxSettings
    from genserve_backend.worker.messages import Done, Event, Failed, Submit

    checkpoint = FluxCheckpoint.load(FLUX_CHECKPOINT)
    events: SimpleQueue[Event] = SimpleQueue()
    settings = FluxSettings(model_path=FLUX_CHECKPOINT, max_padding=padding, max_running=concurrency)
    engine = build(settings, "cpu", events.put)
    rates: list[float] = []
    draw = random.Random(1)

    def submit(job: int) -> None:
        height, width = draw.choice(MIXES[mix])
        values = {"PROMPT": f"picture {job}", "STEPS": STEPS, "SEED": job, "HEIGHT": height, "WIDTH": width}
        request = parse(values, checkpoint, max_pixels=2**28)
        engine.submit(Submit(job, str(job), request, time.monotonic() + TIMEOUT_S))

    def drive() -> None:
        warm_up, total = concurrency, concurrency + requests
        for job in range(concurrency):
            submit(job)
        sent, ended, started = concurrency, 0, 0.0
        while ended < total:
            event = events.get()
            if not isinstance(event, (Done, Failed)):
                continue
            if isinstance(event, Failed):
                raise event.error
            ended += 1
            started = started or (time.monotonic() if ended == warm_up else 0.0)
            if sent < total:
                submit(sent)
                sent += 1
        rates.append(requests / (time.monotonic() - started))

    driver = threading.Thread(target=drive)
    driver.start()
    while driver.is_alive():
        engine.turn()
    print(json.dumps(rates[0]), flush=True)
    os._exit(0)  # the engine's threads never end


@click.command(context_settings=SETTINGS)
@click.option("--requests", type=COUNT, default=24, show_default=True)
@click.option("--concurrency", type=COUNT, default=4, show_default=True)
@click.option("--repeats", type=COUNT, default=2, show_default=True, help="Runs of each; medians count.")
@click.option("--one", type=(click.Choice(list(MIXES)), float), hidden=True)
def main(requests: int, concurrency: int, repeats: int, one: tuple[str, float] | None) -> None:
    """Compare padding with taking turns, for images of mixed sizes."""
    if one:
        run_one(*one, requests, concurrency)
        return
    table = new_table("Sizes", "Turns, images/s", *(f"Padding up to {padding:g}" for padding in PADDINGS[1:]))
    for mix, sizes in MIXES.items():
        speeds: dict[float, list[float]] = {padding: [] for padding in PADDINGS}
        for _ in range(repeats):
            for padding, measured in speeds.items():
                options = ["--requests", str(requests), "--concurrency", str(concurrency)]
                try:
                    measured.append(float(run_script(Path(__file__), "--one", mix, str(padding), *options)))
                except (ServeError, subprocess.TimeoutExpired) as error:
                    fail(error)
        medians = {padding: statistics.median(measured) for padding, measured in speeds.items()}
        ratios = [f"{medians[padding] / medians[0.0]:.2f} x" for padding in PADDINGS[1:]]
        table.add_row(f"{mix}: {len(sizes)} kinds", f"{medians[0.0]:.1f}", *ratios)
    show(table)


if __name__ == "__main__":
    main()
