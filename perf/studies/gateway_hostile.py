"""Hostile requests to a gateway in front of a real server, and 300 requests at once.

schemathesis generates some of them from the gateway's OpenAPI document, some are JSON that no schema allows, and some
are raw bytes. With --check it fails if an answer has a status of 500 or more other than 503, if a connection does not
end, if the gateway's memory grows, if the server restarts, or if gateway or server do not answer afterwards.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from pathlib import Path

import click
import urllib3
from rich import box

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import COUNT, SETTINGS, fail, judge, new_table, show
from genserve.serve.options import ServeError
from genserve.serve.own_server import own_server
from hostile.attack import Attack, Verdict, request, send_all
from hostile.generated import generated
from hostile.mangled import mangled
from hostile.raw import raw
from simulated.gateways import GatewayProcess, gateways

GENERATED, RAW = 0.6, 0.15
"""Shares of the requests, the first one about. The others are mangled JSON."""
WARM_UP = 0.2
"""Share of the requests after which the memory is measured for the first time."""
MOST_GROWTH_MIB = 64.0
AT_ONCE = 300
LOG = Path(__file__).resolve().parents[1] / "results" / "gateway_hostile.log"
"""The server's log."""
READY_S = 120.0
JSON = (b"Content-Type", b"application/json")
IMAGE = b'{"prompt": "a red circle", "size": "64x64", "num_inference_steps": 2}'
RANKING = b'{"query": "capital of France", "documents": ["Berlin", "Paris"]}'

Address = tuple[str, int]


def attacks(document: dict[str, object], count: int, *, seed: int) -> list[Attack]:
    """Return `count` attacks of all kinds, mixed."""
    columns = [list(generated(document, round(count * GENERATED), seed=seed)), list(raw(round(count * RAW), seed=seed))]
    columns.append(list(mangled(count - sum(map(len, columns)), seed=seed)))
    placed = [((index + 0.5) / len(column), each) for column in columns for index, each in enumerate(column)]
    return [each for _, each in sorted(placed, key=lambda pair: pair[0])]


def at_once(address: Address, count: int) -> Verdict:
    """Send images and rankings, all at the same time."""
    image = request(b"POST", b"/v1/images/generations", IMAGE, headers=[JSON])
    ranking = request(b"POST", b"/v2/rerank", RANKING, headers=[JSON])
    both = (Attack("image at once", (image,)), Attack("ranking at once", (ranking,)))
    return send_all(itertools.islice(itertools.cycle(both), count), address, connections=count)


class Gateway:
    """The gateway under attack.

    Args:
        url: Its address.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._http = urllib3.PoolManager(retries=False, timeout=READY_S)
        parts = urllib3.util.parse_url(url)
        self.address: Address = (parts.host or "", parts.port or 0)

    def wait_ready(self, process: GatewayProcess) -> None:
        """Wait until gateway and server are ready.

        Raises:
            ServeError: They are not within two minutes.
        """
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            process.require_running()
            try:
                if self._http.request("GET", f"{self._url}/health").status == 200:
                    return
            except urllib3.exceptions.HTTPError:
                pass
            time.sleep(0.2)
        raise ServeError(f"the gateway was not ready within {READY_S:g} s")

    def document(self) -> dict[str, object]:
        """Return its OpenAPI document."""
        found: dict[str, object] = self._http.request("GET", f"{self._url}/openapi.json").json()
        return found

    def memory_mib(self) -> float:
        """Return its resident memory."""
        text = self._http.request("GET", f"{self._url}/metrics").data.decode()
        line = next(line for line in text.splitlines() if line.startswith("process_resident_memory_bytes "))
        return float(line.split()[1]) / 2**20

    def failures(self) -> list[str]:
        """Return a line for each request that should be answered and is not."""
        found = []
        for path, body in (("/v1/images/generations", IMAGE), ("/v2/rerank", RANKING)):
            answer = self._http.request(
                "POST", self._url + path, body=body, headers={"Content-Type": "application/json"}
            )
            if answer.status != 200:
                found.append(f"afterwards {path} answers {answer.status}: {answer.data[:200]!r}")
        return found


@click.command(context_settings=SETTINGS)
@click.option("--requests", "count", type=COUNT, default=10_000, show_default=True)
@click.option("--connections", type=COUNT, default=16, show_default=True, help="Connections at once.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--check", is_flag=True, help="Fail if a promise does not hold.")
def main(count: int, connections: int, seed: int, check: bool) -> None:
    """Attack a gateway."""
    try:
        LOG.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix="genserve-hostile-") as folder,
            own_server(("flux", "rerank", "tasks"), log=LOG) as addresses,
            gateways(Path(folder), [addresses["grpc"]], 1) as (process,),
        ):
            broken = run(process, count, connections=connections, seed=seed)
    except ServeError as error:
        fail(error)
    ends = [line for line in LOG.read_text(errors="replace").splitlines() if "event=restarting" in line]
    judge([*broken, *ends], check=check)


def run(process: GatewayProcess, count: int, *, connections: int, seed: int) -> list[str]:
    """Attack a gateway, print the result, and return a line for each promise that does not hold."""
    gateway = Gateway(process.url)
    gateway.wait_ready(process)
    found = attacks(gateway.document(), count, seed=seed)
    click.echo(f"{len(found):,} attacks", err=True)
    started = time.monotonic()
    warm = round(len(found) * WARM_UP)
    verdicts = {"first": send_all(found[:warm], gateway.address, connections=connections)}
    before = gateway.memory_mib()
    verdicts["others"] = send_all(found[warm:], gateway.address, connections=connections)
    after = gateway.memory_mib()
    seconds = time.monotonic() - started
    verdicts[f"{AT_ONCE} at once"] = at_once(gateway.address, AT_ONCE)
    process.require_running()
    table = new_table("requests", "sent", "2xx", "4xx", "503", "other 5xx", "no answer", "longest")
    table.box = box.SIMPLE
    for name, verdict in verdicts.items():
        table.add_row(name, *_cells(verdict))
    show(table, f"Hostile requests, seed {seed}: {seconds:.0f} s, memory {before:.0f} to {after:.0f} MiB")
    broken = [line for verdict in verdicts.values() for line in verdict.broken] + gateway.failures()
    if after - before > MOST_GROWTH_MIB:
        broken.append(f"the memory grew by {after - before:.0f} MiB")
    return broken


def _cells(verdict: Verdict) -> list[str]:
    def count(first: int, last: int) -> int:
        return sum(number for status, number in verdict.statuses.items() if first <= status <= last)

    others = count(500, 599) - verdict.statuses[503]
    numbers = (
        verdict.statuses.total(),
        count(200, 299),
        count(400, 499),
        verdict.statuses[503],
        others,
        verdict.statuses[0],
    )
    return [*(f"{number:,}" for number in numbers), f"{verdict.longest_s:.1f} s"]


if __name__ == "__main__":
    main()
