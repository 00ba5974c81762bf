"""Throughput of one client with four servers: `map_generate` against a serial loop over four clients.

Each server is real, except for its device, which takes a fixed time per step and image. Then one server gets a device
that is four times slower: the ideal split keeps all four busy to the end. With --check it fails if a ratio, a share or
the split is outside the project's promise.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import click
from rich import box

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import COUNT, SETTINGS, fail, judge, new_table, show
from genserve import Client, GenServeError
from genserve.serve.options import ServeError
from simulated.fleet import PROTOCOLS, fleet
from simulated.load import Answers, draw_requests, loop_over, map_all

SERVERS = 4
SLOWER = 4
"""Factor by which one server's device is slower in the last load."""
LEAST_RATIO = 3.8
LARGEST_DEVIATION = 0.05
"""Of a server's share from an equal one."""
LEAST_OF_IDEAL = 0.9
"""With one slower server."""
LOOP, EVEN, UNEVEN = "serial loop", "map_generate", "map_generate, uneven"


def measure(requests: int, looped: int, steps: int, step_s: float, protocol: str) -> dict[str, tuple[Answers, float]]:
    """Return each load's answers, with the ideal requests per second of its devices."""
    results = {}
    with fleet([step_s] * SERVERS) as servers:
        urls = [server.url(protocol) for server in servers]
        with ExitStack() as stack:
            clients = [stack.enter_context(Client(url)) for url in urls]
            loop_over(clients, draw_requests(SERVERS, steps=[steps], seed=1))  # connections and caches
            results[LOOP] = loop_over(clients, draw_requests(looped, steps=[steps]))
        with Client(urls) as client:
            results[EVEN] = map_all(client, draw_requests(requests, steps=[steps]))
        servers[-1].device = str(SLOWER * step_s)
        servers[-1].restart()
        with Client(urls) as client:
            results[UNEVEN] = map_all(client, draw_requests(requests, steps=[steps], seed=2))
    alone = 1 / (steps * step_s)
    ideal = {LOOP: alone, EVEN: SERVERS * alone, UNEVEN: (SERVERS - 1 + 1 / SLOWER) * alone}
    return {load: (answers, ideal[load]) for load, answers in results.items()}


def broken_promises(results: dict[str, tuple[Answers, float]]) -> list[str]:
    """Return the promises that do not hold."""
    broken = [f"{load}: {line}" for load, (answers, _) in results.items() for line in answers.faults()]
    even, _ = results[EVEN]
    uneven, ideal = results[UNEVEN]
    ratio = even.rate / results[LOOP][0].rate
    if ratio < LEAST_RATIO:
        broken.append(f"{ratio:.2f} times the rate of the loop, promised {LEAST_RATIO}")
    equal = even.requests / SERVERS
    for number in range(SERVERS):
        share = even.by_server[f"simulated-{number}"]
        if abs(share - equal) > LARGEST_DEVIATION * equal:
            broken.append(f"server {number} answered {share}, promised {equal:g} within {LARGEST_DEVIATION:.0%}")
    if uneven.rate < LEAST_OF_IDEAL * ideal:
        broken.append(f"{uneven.rate / ideal:.2f} of the ideal split with a slower server, promised {LEAST_OF_IDEAL}")
    return broken


@click.command(context_settings=SETTINGS)
@click.option("--requests", type=COUNT, default=400, show_default=True, help="Requests of map_generate.")
@click.option("--looped", type=COUNT, default=100, show_default=True, help="Requests of the loop.")
@click.option("--steps", type=click.IntRange(1, 100), default=4, show_default=True, help="Steps of each request.")
@click.option("--step-s", type=click.FloatRange(0.001), default=0.05, show_default=True, help="Seconds per step.")
@click.option("--protocol", type=click.Choice(PROTOCOLS), default="grpc", show_default=True)
@click.option("--check", is_flag=True, help="Fail if a promise does not hold.")
def main(requests: int, looped: int, steps: int, step_s: float, protocol: str, check: bool) -> None:
    """Measure one client with four servers."""
    try:
        results = measure(requests, looped, steps, step_s, protocol)
    except (ServeError, GenServeError) as error:
        fail(error)
    drawn = new_table("Load", "Requests", "Requests/s", "Times the loop", "Of the ideal", "By server", "Longest, s")
    drawn.box = box.MARKDOWN
    loop = results[LOOP][0].rate
    for title, (answers, ideal) in results.items():
        shares = ", ".join(str(answers.by_server[f"simulated-{number}"]) for number in range(SERVERS))
        ratio, of_ideal = f"{answers.rate / loop:.2f}", f"{answers.rate / ideal:.2f}"
        drawn.add_row(
            title, str(answers.requests), f"{answers.rate:.1f}", ratio, of_ideal, shares, f"{answers.longest_s:.1f}"
        )
    load = f"{SERVERS} servers over {protocol}, {steps} steps of {step_s:g} s"
    show(drawn, f"{load}; uneven: of {SLOWER * step_s:g} s on one of them")
    judge(broken_promises(results), check=check)


if __name__ == "__main__":
    main()
