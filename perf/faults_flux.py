"""How long a FLUX server needs to get over the death, and over the standstill, of a worker with images in flight.

Starts a server with one instance, sends requests, kills or stops the worker, and reports when the first and the last of
them were answered. Every image is compared with the one that was made without a fault.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np
import psutil
from PIL import Image
from rich.console import Console
from rich.table import Table

from genserve import Client, GeneratedImage, GenServeError
from genserve.serve.options import ServeError
from perf_server import own_server

HANG_TIMEOUT_S = 5.0
FAULTS = {"killed (SIGKILL)": signal.SIGKILL, f"stopped (SIGSTOP), given up after {HANG_TIMEOUT_S:g} s": signal.SIGSTOP}
TIMEOUT_S = 240.0
MARK = str(os.getpid())
"""In the environment of everything that this run starts."""


def flux_worker() -> psutil.Process:
    """The worker process of the server that this process has started."""
    for process in psutil.process_iter(["cmdline", "environ"]):
        line = process.info["cmdline"] or []
        if "genserve_backend.worker.process" in line and (process.info["environ"] or {}).get("GENSERVE_PERF") == MARK:
            return process
    raise ServeError("there is no worker")


def images_differ(one: Image.Image, other: Image.Image) -> bool:
    """By more than one level anywhere."""
    return bool(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max() > 1)


def measure(client: Client, requests: int, steps: int, number: int) -> tuple[float, float, int]:
    """Seconds from the fault to the first and to the last answer, and how many images are not what they should be."""

    def make(seed: int) -> GeneratedImage:
        return client.generate(f"picture {seed}", seed=seed, steps=steps)

    with ThreadPoolExecutor(requests) as pool:
        expected = list(pool.map(make, range(requests)))
        answered: list[float] = []

        def timed(seed: int) -> GeneratedImage:
            image = make(seed)
            answered.append(time.monotonic())
            return image

        futures = [pool.submit(timed, seed) for seed in range(requests)]
        while sum(task.step > 0 for status in client.status() for task in status.tasks) < requests:
            time.sleep(0.02)
        fault = time.monotonic()
        flux_worker().send_signal(number)
        images = [future.result() for future in futures]
    wrong = sum(images_differ(one.image, other.image) for one, other in zip(expected, images, strict=True))
    return min(answered) - fault, max(answered) - fault, wrong


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--requests", type=click.IntRange(1, 16), default=8, show_default=True, help="In flight at the fault.")
@click.option("--steps", type=click.IntRange(1, 100), default=60, show_default=True)
def main(requests: int, steps: int) -> None:
    """Kill and stop workers, and report how long it takes to get over it."""
    os.environ |= {"HANG_TIMEOUT": str(HANG_TIMEOUT_S), "GENSERVE_PERF": MARK}
    table = Table("Worker", "First answer, s", "Last answer, s", "Images", "Not as expected")
    try:
        with (
            tempfile.TemporaryDirectory(prefix="genserve-faults-") as folder,
            own_server(("flux", "tasks"), log=Path(folder) / "server.log") as addresses,
            Client(addresses["grpc"], timeout=TIMEOUT_S) as client,
        ):
            for name, number in FAULTS.items():
                first, last, wrong = measure(client, requests, steps, number)
                table.add_row(name, f"{first:.1f}", f"{last:.1f}", str(requests), str(wrong))
    except (ServeError, GenServeError) as error:
        click.echo(f"faults_flux: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
    console = Console()
    console.width = max(console.width, 100)
    console.print(table)


if __name__ == "__main__":
    main()
