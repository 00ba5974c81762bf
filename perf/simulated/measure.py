"""Table of a device from the real engine: the demo's checkpoint on this machine's CPU, or another checkpoint.

Writes a file for `perf/simulated/devices`. Steps are medians at each size and number of rows; the script needs an idle
machine, and says so in the table's source.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import COUNT, FLUX_CHECKPOINT, SETTINGS
from common.engines import flux_engine, flux_requests
from gpu.driver import SteppedDriver
from simulated.device import DEVICES

ROWS = (1, 2, 4, 8)
STEPS = 6
TOKEN_PIXELS = 256

Samples = defaultdict[tuple[Any, ...], list[float]]


class Watch:
    """Times of the engine's parts, by part and arguments.

    Args:
        driver: The engine.
    """

    def __init__(self, driver: SteppedDriver) -> None:
        self.samples: Samples = defaultdict(list)
        engine = driver.engine
        encoder, denoiser, decoder = engine._encoder, engine._denoiser, engine._decoder
        self._wrap(denoiser, "step", lambda images: ("step", images[0].tokens, len(images)), each=1)
        self._wrap(encoder, "_forward", lambda prompts: ("encode", len(prompts)), each=1)
        self._wrap(decoder, "_pictures", lambda images: ("decode", images[0].tokens), each=None)
        self._wrap(decoder, "_write", lambda finished, _: ("file", finished.image.tokens), each=1)

    def _wrap(self, part: Any, name: str, key: Callable[..., tuple[Any, ...]], *, each: int | None) -> None:
        work = getattr(part, name)

        def timed(*arguments: Any) -> Any:
            started = time.monotonic()
            result = work(*arguments)
            seconds = time.monotonic() - started
            self.samples[key(*arguments)].append(seconds / (each or len(arguments[0])))
            return result

        setattr(part, name, timed)

    def points(self, part: str) -> list[list[float]]:
        """Return the medians of a part, by its arguments."""
        found = sorted(key for key in self.samples if key[0] == part)
        return [[*key[1:], float(f"{statistics.median(self.samples[key]):.4g}")] for key in found]


def measure(sizes: Sequence[int], *, threads: int | None, rounds: int) -> Watch:
    """Return the times of all sizes and numbers of rows."""
    settings = {"threads": threads} if threads else {}
    driver = flux_engine(prompt_cache_bytes=0, max_batched_tokens=2**20, **settings)
    watch = Watch(driver)
    for round_number in range(rounds + 1):
        if round_number == 1:
            watch.samples.clear()  # the first round chooses kernels and allocates memory
        for size in sizes:
            for rows in ROWS:
                requests = flux_requests([(size, size)] * rows, steps=STEPS, seed=1000 * round_number + rows)
                driver.finish(driver.submit(requests))
    return watch


def cpu_name() -> str:
    """Return the model of this machine's CPU."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def table(watch: Watch, *, name: str, source: str, text_tokens: int, width: int) -> dict[str, Any]:
    """Return the table as its file has it."""
    steps = watch.points("step")
    return {
        "name": name,
        "kind": "cpu",
        "text_tokens": text_tokens,
        "width": width,
        "step": {"measured": True, "source": source, "floor_s": 0.0, "eager": steps},
        **{part: {"measured": True, "source": source, "points": watch.points(part)} for part in PARTS},
    }


PARTS = ("encode", "decode", "file")


@click.command(context_settings=SETTINGS)
@click.option("--sizes", default="64,128,256", show_default=True, help="Heights and widths in pixels.")
@click.option("--threads", type=COUNT, help="Threads of the engine.  [default: the server's]")
@click.option("--rounds", type=COUNT, default=3, show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=DEVICES / "demo-cpu.json")
def main(sizes: str, threads: int | None, rounds: int, output: Path) -> None:
    """Measure the real engine with the demo's checkpoint, and write a device's table."""
    watch = measure([int(size) for size in sizes.split(",")], threads=threads, rounds=rounds)
    config = json.loads((FLUX_CHECKPOINT / "transformer" / "config.json").read_text(encoding="utf-8"))
    tokens = json.loads((FLUX_CHECKPOINT / "tokenizer_2" / "tokenizer_config.json").read_text(encoding="utf-8"))
    source = f"perf/simulated/measure.py: the demo's checkpoint in float32, {threads or 'all'} threads, {cpu_name()}"
    result = table(
        watch,
        name="the demo's checkpoint on a CPU",
        source=source,
        text_tokens=int(min(tokens["model_max_length"], 512)),
        width=config["num_attention_heads"] * config["attention_head_dim"],
    )
    text = json.dumps(result, indent=2)
    output.write_text(re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", _one_line, text) + "\n", encoding="utf-8")
    click.echo(output)


def _one_line(match: re.Match[str]) -> str:
    return f"[{', '.join(word.strip() for word in match[1].split(','))}]"


if __name__ == "__main__":
    main()
