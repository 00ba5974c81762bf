"""GenServe's reranker, through Triton, against other ways to serve a cross-encoder.

All get the same load in the same run: 64 requests at once with 8 documents of 10 to 400 tokens each, for a BERT with
all-MiniLM-L6-v2's shape and random weights. Prints ratios: absolute times depend on the machine and on other processes.
With --check it fails if a ratio is below the project's promise.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import urllib3
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import COUNT, RERANK_CHECKPOINT, SETTINGS, fail, judge, new_table, run_in_turn, show
from common.script import run_script
from compare.rerank_load import Load, Timing, draw_load, write_cross_encoder
from compare.rerank_servers import export_onnx, run_infinity, run_ours, run_vllm
from genserve import GenServeError
from genserve.serve.options import ServeError

HERE = Path(__file__).parent
SAME = 1e-4
"""Maximum difference of two scores that count as equal."""
LATENCY_PROMISE = 0.7
"""Maximum ratio of our median latency to another server's."""


@dataclass(frozen=True)
class Contender:
    """One way to serve the model, and our promise against it."""

    title: str
    against: str = "genserve"
    """Our contender with the same arithmetic, which this one is compared with."""
    promise: float = 0.0
    """Minimum ratio of our pairs per second to its own."""
    is_server: bool = False
    """True for a complete server: latencies are compared too."""

    @property
    def is_ours(self) -> bool:
        """Return True for GenServe through Triton."""
        return self.title.startswith("GenServe,")


CONTENDERS = {
    "genserve": Contender("GenServe, float32"),
    "engine": Contender("its engine, without Triton", promise=0.95),
    "naive": Contender("one padded forward per request, behind a lock", promise=1.8),
    "offline": Contender("one call with everything, sorted by length"),
    "infinity": Contender("Infinity, torch", promise=1.25, is_server=True),
    "infinity-onnx": Contender("Infinity, ONNX", promise=1.1, is_server=True),
    "vllm": Contender("vLLM", promise=1.1, is_server=True),
    "bfloat16": Contender("GenServe, bfloat16", against="bfloat16"),
    "int8": Contender("GenServe, int8", against="int8"),
    "infinity-int8": Contender("Infinity, ONNX int8", against="int8", promise=1.1, is_server=True),
}


@dataclass
class Result:
    """The runs of one contender."""

    timings: list[Timing]

    @property
    def pairs_per_second(self) -> float:
        """Return the median of the runs."""
        return statistics.median(timing.pairs_per_second for timing in self.timings)

    @property
    def median_latency(self) -> float:
        """Return the median of the runs, in seconds."""
        return statistics.median(timing.median_latency for timing in self.timings)


def runners(
    folder: Path, checkpoint: Path, load: Load, *, infinity: Path | None, vllm: Path | None
) -> dict[str, Callable[[], Timing]]:
    """Return a function for each available contender, by name."""
    load_file = folder / "load.json"
    load_file.write_text(load.to_json(), encoding="utf-8")

    def own_process(name: str) -> Timing:
        return Timing.from_json(run_script(HERE / "rerank_contenders.py", name, str(checkpoint), str(load_file)))

    ours = partial(run_ours, checkpoint, load, folder / "server.log")
    found: dict[str, Callable[[], Timing]] = {"genserve": partial(ours, {})}
    found |= {name: partial(own_process, name) for name in ("engine", "naive", "offline")}
    found |= {name: partial(ours, {"RERANK_DTYPE": name}) for name in ("bfloat16", "int8")}
    if infinity:
        start = partial(run_infinity, infinity.absolute(), load=load, log=folder / "infinity.log")
        found["infinity"] = partial(start, checkpoint, engine="torch")
        found["infinity-onnx"] = partial(start, folder / "onnx" / "fp32", engine="optimum")
        found["infinity-int8"] = partial(start, folder / "onnx" / "int8", engine="optimum")
    if vllm:
        found["vllm"] = partial(run_vllm, vllm.absolute(), checkpoint, load, folder / "vllm.log")
    return {name: found[name] for name in CONTENDERS if name in found}


def table(results: dict[str, Result]) -> Table:
    """Return a table with one line per contender."""
    drawn = new_table("", "Pairs/s", "Ours is", "Median, s", "Ours takes", "Scores differ by")
    for name, result in results.items():
        contender = CONTENDERS[name]
        ours = results.get(contender.against)
        compared = ours is not None and not contender.is_ours
        drawn.add_row(
            contender.title,
            f"{result.pairs_per_second:.1f}",
            f"{ours.pairs_per_second / result.pairs_per_second:.2f} x" if compared and ours else "",
            f"{result.median_latency:.2f}",
            f"{ours.median_latency / result.median_latency:.2f} x" if compared and ours else "",
            "" if name == "genserve" else f"{distance(results['genserve'], result):.0e}",
        )
    return drawn


def distance(one: Result, other: Result) -> float:
    """Return the largest difference between two contenders' scores of a pair."""
    return max(
        abs(mine - theirs)
        for ours, others in zip(one.timings[0].scores, other.timings[0].scores, strict=True)
        for mine, theirs in zip(ours, others, strict=True)
    )


def broken_promises(results: dict[str, Result]) -> list[str]:
    """Return a line for each promise that does not hold."""
    broken = []
    for name, result in results.items():
        contender = CONTENDERS[name]
        ours = results.get(contender.against)
        if ours is None or not contender.promise:
            continue
        ratio = ours.pairs_per_second / result.pairs_per_second
        if ratio < contender.promise:
            broken.append(f"{ratio:.2f} times the pairs per second of {contender.title}, promised {contender.promise}")
        latency = ours.median_latency / result.median_latency
        if contender.is_server and latency > LATENCY_PROMISE:
            broken.append(f"{latency:.2f} times the median latency of {contender.title}, promised {LATENCY_PROMISE}")
        if contender.against == "genserve" and distance(ours, result) > SAME:
            broken.append(f"scores differ from those of {contender.title} by {distance(ours, result):.1e}")
    return broken


@click.command(context_settings=SETTINGS)
@click.option("--requests", type=COUNT, default=64, show_default=True, help="Requests, all at once.")
@click.option("--documents", type=COUNT, default=8, show_default=True, help="Documents per request.")
@click.option(
    "--tokens", type=(int, int), default=(10, 400), show_default=True, help="Minimum and maximum of a document."
)
@click.option("--repeats", type=COUNT, default=3, show_default=True, help="Runs of each contender; medians count.")
@click.option("--only", multiple=True, type=click.Choice(list(CONTENDERS)), help="Contenders. [default: all]")
@click.option(
    "--infinity", type=click.Path(exists=True, path_type=Path), help="infinity_emb in an environment of its own."
)
@click.option("--vllm", type=click.Path(exists=True, path_type=Path), help="python of an environment with vLLM.")
@click.option("--check", is_flag=True, help="Fail if a ratio is below its promise.")
def main(
    requests: int,
    documents: int,
    tokens: tuple[int, int],
    repeats: int,
    only: tuple[str, ...],
    infinity: Path | None,
    vllm: Path | None,
    check: bool,
) -> None:
    """Compare GenServe's reranker with other ways to serve a cross-encoder."""
    try:
        with tempfile.TemporaryDirectory(prefix="genserve-compare-") as temporary:
            folder = Path(temporary)
            checkpoint = folder / "cross-encoder"
            write_cross_encoder(RERANK_CHECKPOINT, checkpoint)
            load = draw_load(checkpoint, requests=requests, documents=documents, tokens=tokens)
            run = runners(folder, checkpoint, load, infinity=infinity, vllm=vllm)
            names = [name for name in run if name == "genserve" or not only or name in only]
            if infinity and {"infinity-onnx", "infinity-int8"} & set(names):
                export_onnx(infinity, checkpoint, folder / "onnx")
            timings = run_in_turn({CONTENDERS[name].title: run[name] for name in names}, repeats)
    except (ServeError, GenServeError, subprocess.TimeoutExpired, urllib3.exceptions.HTTPError) as error:
        fail(error)
    results = {name: Result(timings[CONTENDERS[name].title]) for name in names}
    show(
        table(results), f"{requests} requests at once, {documents} documents of {tokens[0]} to {tokens[1]} tokens each"
    )
    judge(broken_promises(results), check=check)


if __name__ == "__main__":
    main()
