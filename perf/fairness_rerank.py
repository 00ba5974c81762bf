"""How long small rerank requests take while a 1,000-document request runs, against their time alone.

For a cross-encoder of all-MiniLM-L6-v2's shape with random weights, over HTTP. With --check it fails when the ratio is
above what the project promises.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from compare_rerank import SOURCE
from genserve import Client, GenServeError
from genserve.serve.options import ServeError
from own_process import TIMEOUT_S
from perf_server import own_server
from rerank_load import Request, draw_load, write_cross_encoder

PROMISE = 3.0
"""The 95th percentile of small requests beside a large one, at most so many times the median of the same ones alone."""
TOKENS = (50, 150)
SETTLE_S = 1.0
PAUSE_S = 0.2


def timed(client: Client, request: Request) -> float:
    """Seconds, for its caller."""
    started = time.monotonic()
    client.rerank(request.query, request.documents)
    return time.monotonic() - started


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--small", type=click.IntRange(min=1), default=10, show_default=True, help="Requests of two documents.")
@click.option("--documents", type=click.IntRange(min=1), default=1000, show_default=True, help="Of the large request.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--check", is_flag=True, help=f"Fail when the ratio is above {PROMISE}.")
def main(small: int, documents: int, repeats: int, check: bool) -> None:
    """Measure what a large request costs small ones."""
    alone: list[float] = []
    beside: list[float] = []
    large_alone: list[float] = []
    large_beside: list[float] = []
    try:
        with tempfile.TemporaryDirectory(prefix="genserve-fairness-") as temporary:
            folder = Path(temporary)
            checkpoint = folder / "cross-encoder"
            write_cross_encoder(SOURCE, checkpoint)
            few = draw_load(checkpoint, requests=small, documents=2, tokens=TOKENS, seed=1).requests
            (many,) = draw_load(checkpoint, requests=1, documents=documents, tokens=TOKENS, seed=2).requests
            with (
                own_server(
                    ("rerank",), log=folder / "server.log", environment={"RERANK_MODEL_PATH": str(checkpoint)}
                ) as addresses,
                Client(f"http://{addresses['http']}", timeout=TIMEOUT_S) as client,
                ThreadPoolExecutor(1) as pool,
            ):
                timed(client, few[0])
                for _ in range(repeats):
                    large_alone.append(timed(client, many))
                    alone += [timed(client, request) for request in few]
                    large = pool.submit(timed, client, many)
                    time.sleep(SETTLE_S)
                    for request in few:
                        beside.append(timed(client, request))
                        time.sleep(PAUSE_S)
                    if large.done():
                        raise ServeError("the large request was done before the small ones: give it more documents")
                    large_beside.append(large.result())
    except (ServeError, GenServeError) as error:
        click.echo(f"fairness_rerank: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
    drawn = Table()
    for heading in ("", "Alone, s", "Together, s", "Ratio"):
        drawn.add_column(heading, justify="right" if heading else "left")
    usual, worst = statistics.median(alone), float(np.percentile(beside, 95))
    rows = {
        "2 documents, median": (usual, statistics.median(beside)),
        "2 documents, 95th percentile together": (usual, worst),
        f"{documents:,} documents": (statistics.median(large_alone), statistics.median(large_beside)),
    }
    for title, (one, other) in rows.items():
        drawn.add_row(title, f"{one:.3f}", f"{other:.3f}", f"{other / one:.2f}")
    Console().print(drawn)
    if check and worst > PROMISE * usual:
        click.echo(f"{worst / usual:.2f} times their time alone, promised {PROMISE}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
