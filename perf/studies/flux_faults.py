"""Recovery time of a FLUX server after a crash and after a hang of its worker, with images in flight.

Starts a server with one instance, sends requests, kills or stops the worker, and reports the times of the first and the
last response. Every image is compared with the same one made without a fault.
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
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import SETTINGS, fail, show
from genserve import Client, GeneratedImage, GenServeError
from genserve.serve.options import ServeError
from genserve.serve.own_server import own_server

HANG_TIMEOUT_S = 5.0
FAULTS = {"killed (SIGKILL)": signal.SIGKILL, f"stopped (SIGSTOP), killed after {HANG_TIMEOUT_S:g} s": signal.SIGSTOP}
TIMEOUT_S = 240.0
MARK = str(os.getpid())
"""Value of GENSERVE_PERF in the environment of all processes of this run."""


def flux_worker() -> psutil.Process:
    """Return the worker process of this run's server."""
    for process in psutil.process_iter(["cmdline", "environ"]):
        line = process.info["cmdline"] or []
        if "genserve_backend.worker.process" in line and (process.info["environ"] or {}).get("GENSERVE_PERF") == MARK:
            return process
    raise ServeError("there is no worker")


def images_differ(one: Image.Image, other: Image.Image) -> bool:
    """Return True if a value differs by more than one level."""
    return bool(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max() > 1)


def measure(client: Client, requests: int, steps: int, number: int) -> tuple[float, float, int]:
    """Return the seconds from the fault to the first and to the last response, and the number of wrong images."""

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


@click.command(context_settings=SETTINGS)
@click.option(
    "--requests", type=click.IntRange(1, 16), default=8, show_default=True, help="Requests in flight at the fault."
)
@click.option("--steps", type=click.IntRange(1, 100), default=60, show_default=True)
def main(requests: int, steps: int) -> None:
    """Kill and stop workers, and report the time to recover."""
    os.environ |= {"HANG_TIMEOUT": str(HANG_TIMEOUT_S), "GENSERVE_PERF": MARK}
    table = Table("Worker", "First response, s", "Last response, s", "Images", "Wrong")
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
        fail(error)
    show(table)


if __name__ == "__main__":
    main()
