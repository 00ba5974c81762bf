"""GenServe's reranker, through Triton, against other ways to serve a cross-encoder, in the same run.

64 requests at once with 8 documents of 10 to 400 tokens each, for a BERT of all-MiniLM-L6-v2's shape, random weights.
Prints ratios: absolute times mean little on a machine that does other things too. With --check it fails when one is
below what the project promises.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

import click
import urllib3
from rich.console import Console
from rich.table import Table

from genserve import GenServeError
from genserve.serve.options import ServeError
from own_process import last_line
from rerank_load import Load, Timing, draw_load, write_cross_encoder
from rerank_servers import export_onnx, run_infinity, run_ours, run_vllm

HERE = Path(__file__).parent
SOURCE = HERE.parent / "demo" / "rerank"
SAME = 1e-4
LATENCY_PROMISE = 0.7
"""Median latency of ours, at most so many times that of another server."""


@dataclass(frozen=True)
class Contender:
    """A row of the table."""

    title: str
    against: str = "genserve"
    """Which of ours it is compared with: the one of the same arithmetic."""
    promise: float = 0.0
    """Pairs per second of ours, at least so many times its own."""
    is_server: bool = False
    """Whether it is a whole server, so that its latencies can be compared too."""

    @property
    def is_ours(self) -> bool:
        """Whether it is GenServe, through Triton."""
        return self.title.startswith("GenServe,")


CONTENDERS = {
    "genserve": Contender("GenServe, float32"),
    "engine": Contender("its engine, without Triton", promise=0.95),
    "naive": Contender("one padded forward a request, behind a lock", promise=1.8),
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

    timings: list[Timing] = field(default_factory=list)

    @property
    def pairs_per_second(self) -> float:
        """The median of the runs."""
        return statistics.median(timing.pairs_per_second for timing in self.timings)

    @property
    def median_latency(self) -> float:
        """The median over the runs, in seconds."""
        return statistics.median(timing.median_latency for timing in self.timings)


def runners(
    folder: Path, checkpoint: Path, load: Load, *, infinity: Path | None, vllm: Path | None
) -> dict[str, Callable[[], Timing]]:
    """How to run each contender that there is."""
    load_file = folder / "load.json"
    load_file.write_text(load.to_json(), encoding="utf-8")

    def own_process(name: str) -> Timing:
        return Timing.from_json(last_line(HERE / "rerank_contenders.py", name, str(checkpoint), str(load_file)))

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
    """One row for each contender."""
    drawn = Table()
    drawn.add_column("")
    for heading in ("Pairs/s", "Ours is", "Median, s", "Ours takes", "Scores differ by"):
        drawn.add_column(heading, justify="right")
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
    """The largest difference between two contenders' scores of a pair."""
    return max(
        abs(mine - theirs)
        for ours, others in zip(one.timings[0].scores, other.timings[0].scores, strict=True)
        for mine, theirs in zip(ours, others, strict=True)
    )


def broken_promises(results: dict[str, Result]) -> list[str]:
    """What is not as the project says."""
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


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--requests", type=click.IntRange(min=1), default=64, show_default=True, help="All at once.")
@click.option("--documents", type=click.IntRange(min=1), default=8, show_default=True, help="Of each request.")
@click.option("--tokens", type=(int, int), default=(10, 400), show_default=True, help="Of a document, from and to.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each, in turn.")
@click.option("--only", multiple=True, type=click.Choice(list(CONTENDERS)), help="Less to do.")
@click.option("--infinity", type=click.Path(exists=True, path_type=Path), help="infinity_emb, in its environment.")
@click.option("--vllm", type=click.Path(exists=True, path_type=Path), help="python of vLLM's environment.")
@click.option("--check", is_flag=True, help="Fail when a ratio is below what is promised.")
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
            write_cross_encoder(SOURCE, checkpoint)
            load = draw_load(checkpoint, requests=requests, documents=documents, tokens=tokens)
            run = runners(folder, checkpoint, load, infinity=infinity, vllm=vllm)
            results = {name: Result() for name in run if name == "genserve" or not only or name in only}
            if infinity and {"infinity-onnx", "infinity-int8"} & results.keys():
                export_onnx(infinity, checkpoint, folder / "onnx")
            for repeat in range(repeats):
                for name, result in results.items():
                    click.echo(f"run {repeat + 1} of {repeats}: {CONTENDERS[name].title}", err=True)
                    result.timings.append(run[name]())
    except (ServeError, GenServeError, subprocess.TimeoutExpired, urllib3.exceptions.HTTPError) as error:
        _fail(str(error))
    console = Console()
    console.width = max(console.width, 110)
    console.print(f"{requests} requests at once, {documents} documents of {tokens[0]} to {tokens[1]} tokens each")
    console.print(table(results))
    for line in (broken := broken_promises(results)):
        click.echo(line, err=True)
    if check and broken:
        sys.exit(1)


def _fail(message: str) -> NoReturn:
    click.echo(f"compare_rerank: {' '.join(message.split())}", err=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
