"""Latency of small rerank requests alongside a request with 1,000 documents, against their latency alone.

For a cross-encoder with all-MiniLM-L6-v2's shape and random weights, over HTTP. With --check it fails if the ratio is
above the project's promise.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import COUNT, RERANK_CHECKPOINT, SETTINGS, fail, judge, new_table, show
from common.script import TIMEOUT_S
from compare.rerank_load import Request, draw_load, write_cross_encoder
from genserve import Client, GenServeError
from genserve.serve.options import ServeError
from genserve.serve.own_server import own_server

PROMISE = 3.0
"""Maximum ratio of the small requests' 95th percentile alongside the large one to their median alone."""
TOKENS = (50, 150)
SETTLE_S = 1.0
"""Seconds from the large request to the first small one."""
PAUSE_S = 0.2


def timed(client: Client, request: Request) -> float:
    """Return the latency of a request in seconds."""
    started = time.monotonic()
    client.rerank(request.query, request.documents)
    return time.monotonic() - started


@click.command(context_settings=SETTINGS)
@click.option("--small", type=COUNT, default=10, show_default=True, help="Requests with two documents.")
@click.option("--documents", type=COUNT, default=1000, show_default=True, help="Documents of the large request.")
@click.option("--repeats", type=COUNT, default=3, show_default=True)
@click.option("--check", is_flag=True, help=f"Fail if the ratio is above {PROMISE}.")
def main(small: int, documents: int, repeats: int, check: bool) -> None:
    """Measure the latency of small requests alongside a large one."""
    alone: list[float] = []
    together: list[float] = []
    large_alone: list[float] = []
    large_together: list[float] = []
    try:
        with tempfile.TemporaryDirectory(prefix="genserve-fairness-") as temporary:
            folder = Path(temporary)
            checkpoint = folder / "cross-encoder"
            write_cross_encoder(RERANK_CHECKPOINT, checkpoint)
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
                        together.append(timed(client, request))
                        time.sleep(PAUSE_S)
                    if large.done():
                        raise ServeError("the large request ended before the small ones: raise --documents")
                    large_together.append(large.result())
    except (ServeError, GenServeError) as error:
        fail(error)
    drawn = new_table("", "Alone, s", "Together, s", "Ratio")
    usual, worst = statistics.median(alone), float(np.percentile(together, 95))
    lines = {
        "2 documents, median": (usual, statistics.median(together)),
        "2 documents, 95th percentile together": (usual, worst),
        f"{documents:,} documents": (statistics.median(large_alone), statistics.median(large_together)),
    }
    for title, (one, other) in lines.items():
        drawn.add_row(title, f"{one:.3f}", f"{other:.3f}", f"{other / one:.2f}")
    show(drawn)
    broken = [f"{worst / usual:.2f} times their latency alone, promised {PROMISE}"]
    judge(broken if worst > PROMISE * usual else [], check=check)


if __name__ == "__main__":
    main()
