"""Contenders of the FLUX comparison: ways to serve FLUX from one process.

``python perf/compare/flux_contenders.py NAME CHECKPOINT LOAD.json`` prints JSON. perf/compare/flux.py starts one
process per contender. They answer calls of their own process without a server in front, which is an advantage.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from diffusers import FluxPipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compare.engine_task import EngineTask
from compare.flux_load import Load, Request, Timing, drive
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.request import parse
from genserve_backend.settings import FluxSettings
from genserve_backend.worker.messages import Start
from genserve_backend.worker.supervisor import Supervisor


class Pipeline:
    """FluxPipeline as in a web process: prompts in, PNG files out."""

    def __init__(self, checkpoint: FluxCheckpoint) -> None:
        self._tokens = checkpoint.max_sequence_length
        self._pipeline = FluxPipeline.from_pretrained(checkpoint.path)
        self._pipeline.set_progress_bar_config(disable=True)

    def __call__(self, requests: Sequence[Request], size: int) -> list[bytes]:
        """Return one image per request; all requests have the same number of steps."""
        images = self._pipeline(
            prompt=[request.prompt for request in requests],
            num_inference_steps=requests[0].steps,
            height=size,
            width=size,
            max_sequence_length=self._tokens,
            generator=[torch.Generator("cpu").manual_seed(request.seed) for request in requests],
        ).images
        return [png(image) for image in images]


def png(image: Any) -> bytes:
    """Encode an image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def global_lock(checkpoint: FluxCheckpoint, load: Load) -> Callable[[Request], object]:
    """Return calls of one pipeline with all CPU threads, behind a lock."""
    pipeline, lock = Pipeline(checkpoint), threading.Lock()

    def call(request: Request) -> object:
        with lock:
            return pipeline([request], load.size)

    return call


def pool(checkpoint: FluxCheckpoint, load: Load) -> Callable[[Request], object]:
    """Return calls of one pipeline per CPU, each with a thread of its own."""
    count = os.cpu_count() or 1
    pipelines: SimpleQueue[Pipeline] = SimpleQueue()
    for _ in range(count):
        pipelines.put(Pipeline(checkpoint))
    threads = ThreadPoolExecutor(count, initializer=lambda: torch.set_num_threads(1))

    def work(request: Request) -> object:
        pipeline = pipelines.get()
        try:
            return pipeline([request], load.size)
        finally:
            pipelines.put(pipeline)

    return lambda request: threads.submit(work, request).result()


class Waiting:
    """A queue that is served in batches of equal settings."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._requests: list[tuple[Request, Future[bytes]]] = []

    def call(self, request: Request) -> bytes:
        """Wait for an image."""
        answer: Future[bytes] = Future()
        with self._changed:
            self._requests.append((request, answer))
            self._changed.notify()
        return answer.result()

    def serve(self, work: Callable[[list[Request]], list[bytes]]) -> None:
        """Serve batches forever: the oldest request with all others of the same settings; they end together."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._requests)
                steps = self._requests[0][0].steps
                batch = [each for each in self._requests if each[0].steps == steps]
                self._requests = [each for each in self._requests if each[0].steps != steps]
            images = work([request for request, _ in batch])
            for (_, answer), image in zip(batch, images, strict=True):
                answer.set_result(image)


def static_batches(checkpoint: FluxCheckpoint, load: Load) -> Callable[[Request], object]:
    """Return calls of one pipeline with all CPU threads, in static batches."""
    waiting, pipeline = Waiting(), Pipeline(checkpoint)
    threading.Thread(target=waiting.serve, args=[lambda batch: pipeline(batch, load.size)], daemon=True).start()
    return waiting.call


_own: dict[str, Pipeline] = {}


def _load_own(checkpoint: FluxCheckpoint) -> None:
    torch.set_num_threads(1)
    _own["pipeline"] = Pipeline(checkpoint)


def _run_own(batch: list[Request], size: int) -> list[bytes]:
    return _own["pipeline"](batch, size)


def static_fleet(checkpoint: FluxCheckpoint, load: Load) -> Callable[[Request], object]:
    """Return calls of one single-threaded process per CPU, in static batches out of one queue."""
    waiting = Waiting()
    count = os.cpu_count() or 1
    spawn = multiprocessing.get_context("spawn")
    for _ in range(count):
        process = ProcessPoolExecutor(1, mp_context=spawn, initializer=_load_own, initargs=(checkpoint,))

        def work(batch: list[Request], process: ProcessPoolExecutor = process) -> list[bytes]:
            return process.submit(_run_own, batch, load.size).result()

        threading.Thread(target=waiting.serve, args=[work], daemon=True).start()
    return waiting.call


def engines(checkpoint: FluxCheckpoint, load: Load) -> Callable[[Request], object]:
    """Return calls of one of GenServe's engines per CPU, each in its worker, without a server in front."""
    settings = FluxSettings(model_path=checkpoint.path, threads=1)
    count = os.cpu_count() or 1
    supervisors = [
        Supervisor(Start("genserve_backend.flux.build:build", settings, "cpu", f"flux_{index}"))
        for index in range(count)
    ]
    for supervisor in supervisors:
        supervisor.start()
    in_flight = [0] * count
    lock = threading.Lock()
    size = {"HEIGHT": load.size, "WIDTH": load.size}

    def call(request: Request) -> object:
        values = {"PROMPT": request.prompt, "STEPS": request.steps, "SEED": request.seed}
        parsed = parse(values | size, checkpoint, max_pixels=2**28)
        with lock:
            index = in_flight.index(min(in_flight))
            in_flight[index] += 1
        task = EngineTask(str(request.seed))
        supervisors[index].submit(task, parsed, deadline=time.monotonic() + 600)
        try:
            return task.answer.result()
        finally:
            with lock:
                in_flight[index] -= 1

    return call


CONTENDERS = {
    "engine": engines,
    "lock": global_lock,
    "pool": pool,
    "static": static_batches,
    "fleet": static_fleet,
}


def finish(timing: Timing) -> None:
    """Print the result and end the process and its children, even if other threads still run."""
    print(timing.to_json(), flush=True)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(0)


def main(name: str, checkpoint_path: str, load_path: str) -> None:
    """Run one contender under the load."""
    checkpoint = FluxCheckpoint.load(Path(checkpoint_path))
    load = Load.from_json(Path(load_path).read_text(encoding="utf-8"))
    finish(drive(CONTENDERS[name](checkpoint, load), load))


if __name__ == "__main__":
    main(*sys.argv[1:4])
