"""What it is worth to let images of different sizes share a forward, padded, instead of taking turns.

Drives the engine in-process with several limits on padding, in turn and several times over, and prints images per
second relative to turns. `max_padding`'s default was chosen with it.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue

import click
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
CHECKPOINT = HERE.parent / "demo" / "flux"
MIXES = {
    "near": [(112, 128), (128, 112), (128, 128), (128, 144), (144, 128)],
    "two": [(128, 128), (256, 256)],
    "many": [(64, 64), (64, 128), (128, 128), (192, 128), (192, 192), (256, 192), (256, 256)],
}
PADDINGS = (0.0, 0.25, 0.5, 1.0)
STEPS = 10
TIMEOUT_S = 600


def run_one(mix: str, padding: float, requests: int, concurrency: int) -> None:
    """In a process of its own, whose main thread is the engine's; prints images per second."""
    from genserve_backend.flux.checkpoint import FluxCheckpoint
    from genserve_backend.flux.load import build
    from genserve_backend.flux.request import parse
    from genserve_backend.settings import FluxSettings
    from genserve_backend.worker.messages import Done, Event, Failed, Submit

    checkpoint = FluxCheckpoint.read(CHECKPOINT)
    events: SimpleQueue[Event] = SimpleQueue()
    settings = FluxSettings(model_path=CHECKPOINT, max_padding=padding, max_running=concurrency)
    engine = build(settings, "cpu", events.put)
    draw = random.Random(1)  # noqa: S311

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
        print(json.dumps(requests / (time.monotonic() - started)), flush=True)

    driver = threading.Thread(target=drive)
    driver.start()
    while driver.is_alive():
        engine.turn()


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--requests", type=click.IntRange(min=1), default=24, show_default=True)
@click.option("--concurrency", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=2, show_default=True, help="Medians count.")
@click.option("--one", type=(click.Choice(list(MIXES)), float), hidden=True)
def main(requests: int, concurrency: int, repeats: int, one: tuple[str, float] | None) -> None:
    """Compare padding with taking turns, for images of mixed sizes."""
    if one:
        run_one(*one, requests, concurrency)
        return
    table = Table()
    table.add_column("Sizes")
    table.add_column("Turns, images/s", justify="right")
    for padding in PADDINGS[1:]:
        table.add_column(f"Padding up to {padding:g}", justify="right")
    for mix, sizes in MIXES.items():
        speeds: dict[float, list[float]] = {padding: [] for padding in PADDINGS}
        for _ in range(repeats):
            for padding, measured in speeds.items():
                command = [sys.executable, __file__, "--one", mix, str(padding)]
                command += ["--requests", str(requests), "--concurrency", str(concurrency)]
                ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
                if ended.returncode:
                    click.echo(ended.stderr, err=True)
                    sys.exit(1)
                measured.append(float(ended.stdout.strip().rpartition("\n")[2]))
        medians = {padding: statistics.median(measured) for padding, measured in speeds.items()}
        ratios = [f"{medians[padding] / medians[0.0]:.2f} x" for padding in PADDINGS[1:]]
        table.add_row(f"{mix}: {len(sizes)} kinds", f"{medians[0.0]:.1f}", *ratios)
    console = Console()
    console.width = max(console.width, 100)
    console.print(table)


if __name__ == "__main__":
    main()
