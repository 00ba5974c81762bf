"""GenServe's reranker, through Triton, against other ways to serve a cross-encoder, in the same run.

64 requests at once with 8 documents of 10 to 400 tokens each, for a BERT of all-MiniLM-L6-v2's shape, random weights.
Prints ratios: absolute times mean little on a machine that does other things too.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import click
import urllib3
from rich.console import Console
from rich.table import Table

from genserve import Client, GenServeError
from genserve.serve.options import ServeError
from genserve.serve.ports import free_ports
from own_process import TIMEOUT_S, last_line
from perf_server import own_server
from rerank_load import Load, Request, Timing, draw_load, drive, write_cross_encoder

HERE = Path(__file__).parent
SOURCE = HERE.parent / "demo" / "rerank"
OURS = "genserve"
ROWS = {
    OURS: "GenServe, through Triton (HTTP)",
    "engine": "GenServe's engine, without Triton",
    "naive": "one padded forward a request, behind a lock",
    "offline": "one call with everything, sorted by length",
    "infinity": "Infinity, torch engine (HTTP)",
}
SAME = 1e-4


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


def run_ours(checkpoint: Path, load: Load, log: Path) -> Timing:
    """Through Triton."""
    environment = {"RERANK_MODEL_PATH": str(checkpoint)}
    with (
        own_server(("rerank",), log=log, environment=environment) as addresses,
        Client(f"http://{addresses['http']}", timeout=TIMEOUT_S) as client,
    ):

        def call(request: Request) -> list[float]:
            ranked = client.rerank(request.query, request.documents)
            return [document.score for document in sorted(ranked, key=lambda document: document.index)]

        return drive(call, load)


def run_contender(name: str, checkpoint: Path, load_file: Path) -> Timing:
    """In a process of its own."""
    return Timing.from_json(last_line(HERE / "rerank_contenders.py", name, str(checkpoint), str(load_file)))


@contextmanager
def infinity(binary: str, checkpoint: Path) -> Iterator[str]:
    """An Infinity server of its own; gives its address."""
    (port,) = free_ports(1)
    command = [binary, "v2", "--model-id", str(checkpoint), "--engine", "torch", "--device", "cpu"]
    command += ["--no-bettertransformer", "--host", "127.0.0.1", "--port", str(port), "--url-prefix", ""]
    environment = {**os.environ, "INFINITY_ANONYMOUS_USAGE_STATS": "0", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ready = urllib3.Retry(total=60, backoff_factor=0.5, backoff_max=2, status_forcelist=[502, 503])
        urllib3.request("GET", f"http://127.0.0.1:{port}/health", retries=ready)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def run_infinity(binary: str, checkpoint: Path, load: Load) -> Timing:
    """Over HTTP, as ours."""
    with infinity(binary, checkpoint) as url, urllib3.PoolManager(maxsize=len(load.requests)) as pool:

        def call(request: Request) -> list[float]:
            body = {"model": checkpoint.name, "query": request.query, "documents": list(request.documents)}
            answer = pool.request("POST", f"{url}/rerank", json=body, timeout=TIMEOUT_S)
            if answer.status != 200:
                raise ServeError(f"infinity answered {answer.status}: {answer.data[:200]!r}")
            results = sorted(answer.json()["results"], key=lambda each: each["index"])
            return [each["relevance_score"] for each in results]

        return drive(call, load)


def table(results: dict[str, Result]) -> Table:
    """One row for each contender."""
    drawn = Table()
    drawn.add_column("")
    for heading in ("Pairs/s", "Ours is", "Median, s", "Ours takes"):
        drawn.add_column(heading, justify="right")
    ours = results[OURS]
    for name, result in results.items():
        drawn.add_row(
            ROWS[name],
            f"{result.pairs_per_second:.1f}",
            "" if name == OURS else f"{ours.pairs_per_second / result.pairs_per_second:.2f} x",
            f"{result.median_latency:.2f}",
            "" if name == OURS else f"{ours.median_latency / result.median_latency:.2f} x",
        )
    return drawn


def different(results: dict[str, Result]) -> list[str]:
    """Who gave other scores than ours, and how far off."""
    ours = results[OURS].timings[0].scores
    distances = {
        name: max(
            abs(one - other)
            for mine, theirs in zip(ours, result.timings[0].scores, strict=True)
            for one, other in zip(mine, theirs, strict=True)
        )
        for name, result in results.items()
    }
    return [f"{ROWS[name]}: scores differ by {distance:.1e}" for name, distance in distances.items() if distance > SAME]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--requests", type=click.IntRange(min=1), default=64, show_default=True, help="All at once.")
@click.option("--documents", type=click.IntRange(min=1), default=8, show_default=True, help="Of each request.")
@click.option("--tokens", type=(int, int), default=(10, 400), show_default=True, help="Of a document, from and to.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each.")
@click.option("--only", multiple=True, type=click.Choice([name for name in ROWS if name != OURS]), help="Less to do.")
@click.option("--infinity", "binary", help="The infinity_emb of an environment of its own, to compare with.")
def main(
    requests: int, documents: int, tokens: tuple[int, int], repeats: int, only: tuple[str, ...], binary: str | None
) -> None:
    """Compare GenServe's reranker with other ways to serve a cross-encoder."""
    names = [name for name in ROWS if name == OURS or not only or name in only]
    results = {name: Result() for name in names if name != "infinity" or binary}
    try:
        with tempfile.TemporaryDirectory(prefix="genserve-compare-") as folder:
            checkpoint = Path(folder) / "cross-encoder"
            write_cross_encoder(SOURCE, checkpoint)
            load = draw_load(checkpoint, requests=requests, documents=documents, tokens=tokens)
            load_file = Path(folder) / "load.json"
            load_file.write_text(load.to_json(), encoding="utf-8")
            for repeat in range(repeats):
                for name, result in results.items():
                    click.echo(f"run {repeat + 1} of {repeats}: {ROWS[name]}", err=True)
                    if name == OURS:
                        timing = run_ours(checkpoint, load, Path(folder) / "server.log")
                    elif name == "infinity" and binary:
                        timing = run_infinity(binary, checkpoint, load)
                    else:
                        timing = run_contender(name, checkpoint, load_file)
                    result.timings.append(timing)
    except (ServeError, GenServeError, subprocess.TimeoutExpired, urllib3.exceptions.HTTPError) as error:
        _fail(str(error))
    console = Console()
    console.width = max(console.width, 110)
    console.print(f"{requests} requests at once, {documents} documents of {tokens[0]} to {tokens[1]} tokens each")
    console.print(table(results))
    for line in different(results):
        click.echo(line, err=True)


def _fail(message: str) -> NoReturn:
    click.echo(f"compare_rerank: {' '.join(message.split())}", err=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
