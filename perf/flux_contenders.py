"""Ways to serve FLUX from one process, each under the same load: what GenServe is compared with.

Run by compare_flux.py, one process for each: ``python flux_contenders.py NAME CHECKPOINT LOAD.json``. Prints JSON.
They answer calls of their own process, with no server in front, and so have an advantage.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from diffusers import FluxPipeline
from flux_load import Load, Request, Timing, drive

from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.load import build
from genserve_backend.flux.request import FluxRequest, parse
from genserve_backend.settings import FluxSettings
from genserve_backend.worker.messages import Done, Event, Failed, Submit

SEQUENCE_LENGTH_FILE = "tokenizer_2/tokenizer_config.json"


class Pipeline:
    """FluxPipeline as a web process would call it: prompts in, PNG files out."""

    def __init__(self, checkpoint: FluxCheckpoint) -> None:
        self._tokens = checkpoint.max_sequence_length
        self._pipeline = FluxPipeline.from_pretrained(checkpoint.path)
        self._pipeline.set_progress_bar_config(disable=True)

    def __call__(self, requests: Sequence[Request], size: int) -> list[bytes]:
        """One image for each request; all have the same number of steps."""
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
    """The file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def global_lock(checkpoint: FluxCheckpoint, load: Load) -> Callable[[Request], object]:
    """One pipeline behind one lock; it has all CPU threads."""
    pipeline, lock = Pipeline(checkpoint), threading.Lock()

    def call(request: Request) -> object:
        with lock:
            return pipeline([request], load.size)

    return call


def pool(checkpoint: FluxCheckpoint, load: Load) -> Callable[[Request], object]:
    """A pipeline for each CPU, each with a thread of its own."""
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


def static_batches(checkpoint: FluxCheckpoint, load: Load) -> Callable[[Request], object]:
    """One pipeline; the oldest request goes with all that wait and have the same settings, and they end together."""
    pipeline = Pipeline(checkpoint)
    waiting: list[tuple[Request, Future[bytes]]] = []
    changed = threading.Condition()

    def work() -> None:
        while True:
            with changed:
                changed.wait_for(lambda: waiting)
                batch = [each for each in waiting if each[0].steps == waiting[0][0].steps]
                waiting[:] = [each for each in waiting if each not in batch]
            images = pipeline([request for request, _ in batch], load.size)
            for (_, answer), image in zip(batch, images, strict=True):
                answer.set_result(image)

    threading.Thread(target=work, daemon=True).start()

    def call(request: Request) -> object:
        answer: Future[bytes] = Future()
        with changed:
            waiting.append((request, answer))
            changed.notify()
        return answer.result()

    return call


@dataclass
class InProcess:
    """GenServe's engine without a server: it runs in the main thread, as in a worker."""

    checkpoint: FluxCheckpoint
    load: Load

    def run(self) -> None:
        """Drive it from another thread, print the result, and end the process."""
        events: SimpleQueue[Event] = SimpleQueue()
        self._answers: dict[int, Future[Any]] = {}
        self._engine = build(FluxSettings(model_path=self.checkpoint.path), "cpu", events.put)
        self._events = events
        threading.Thread(target=self._hear, daemon=True).start()
        threading.Thread(target=self._drive, daemon=True).start()
        self._engine.run()

    def _hear(self) -> None:
        while True:
            event = self._events.get()
            if isinstance(event, Done):
                self._answers[event.job].set_result(event.result)
            elif isinstance(event, Failed):
                self._answers[event.job].set_exception(event.error)

    def _call(self, request: Request) -> object:
        job = request.seed
        answer = self._answers[job] = Future()
        submit = Submit(job, str(job), self._parse(request), time.monotonic() + 600)
        self._engine.submit(submit)
        return answer.result()

    def _parse(self, request: Request) -> FluxRequest:
        values = {"PROMPT": request.prompt, "STEPS": request.steps, "SEED": request.seed}
        size = {"HEIGHT": self.load.size, "WIDTH": self.load.size}
        return parse(values | size, self.checkpoint, max_pixels=2**28)

    def _drive(self) -> None:
        finish(drive(self._call, self.load))


CONTENDERS = {"lock": global_lock, "pool": pool, "static": static_batches}


def finish(timing: Timing) -> None:
    """Print the result and end the process, whatever its other threads do."""
    print(timing.to_json(), flush=True)
    os._exit(0)


def main(name: str, checkpoint_path: str, load_path: str) -> None:
    """Run one contender."""
    checkpoint = FluxCheckpoint.read(Path(checkpoint_path))
    load = Load.from_json(Path(load_path).read_text(encoding="utf-8"))
    if name == "engine":
        InProcess(checkpoint, load).run()
    else:
        finish(drive(CONTENDERS[name](checkpoint, load), load))


if __name__ == "__main__":
    main(*sys.argv[1:4])
