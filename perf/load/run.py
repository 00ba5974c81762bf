"""`make perf`: perf_analyzer against the models, in a closed loop and with Poisson arrivals, with CSV reports.

Starts a server of its own on free ports, unless --url names one.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import SETTINGS, fail, show
from genserve.serve.options import ServeError
from genserve.serve.own_server import Addresses, own_server
from load.binary import Binary, find
from load.report import PROTOCOLS, Failure, Level, Load, csv_path, first_error, merge, parse_all, parse_csv, summary

PERF = Path(__file__).resolve().parents[1]
REQUESTS = {"flux": 12, "rerank": 30}
"""Minimum under each load. perf_analyzer checks once a second if a window is full, so three windows take at least
3 s and hold many more quick requests."""
WINDOWS = 3
"""Windows of a measurement. All of them count: with `ANY_STABILITY` no result is unstable."""
ANY_STABILITY = "100000"


@dataclass(frozen=True)
class Plan:
    """Options of all measurements."""

    binary: Binary
    addresses: Addresses
    inputs: Path
    requests: int | None
    timeout_s: float

    def measure(self, model: str, protocol: str, load: Load, report: Path) -> None:
        """Measure one level into a CSV file.

        Not with --request-count: the clock would stop up to a second after the load, and quick requests would look
        slower than they are.

        Raises:
            Failure: A request failed, or perf_analyzer did.
        """
        requests = self.requests or REQUESTS.get(model, min(REQUESTS.values()))
        self._run(model, protocol, load, report, requests)

    def warm_up(self, model: str, protocol: str, report: Path) -> None:
        """Send a few requests without a report: the first requests of a server are slower."""
        self._run(model, protocol, Load(False, 1), report, 1)

    def _run(self, model: str, protocol: str, load: Load, report: Path, requests: int) -> None:
        # A window without a request in the server's counts is an error to perf_analyzer, and requests in flight at its
        # start may have been counted before.
        in_window = max(-(-requests // WINDOWS), 2 if load.is_poisson else int(load.amount) + 1)
        command = [str(self.binary.path), "-m", model, "-i", protocol, "-u", self.addresses[protocol]]
        command += ["--input-data", str(self.inputs / f"{model}.json"), *load.flags]
        command += ["--measurement-mode", "count_windows", "--measurement-request-count", str(in_window)]
        command += ["--max-trials", str(WINDOWS), "--stability-percentage", ANY_STABILITY]
        command += ["-f", str(report), "--verbose-csv"]
        if "metrics" in self.addresses:
            command += ["--collect-metrics", "--metrics-url", f"{self.addresses['metrics']}/metrics"]
        try:
            result = subprocess.run(
                command,
                env={**os.environ, **self.binary.environment},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Failure(model, protocol, load, f"not finished within {self.timeout_s:g} s") from None
        # The perf-analyzer package's launcher exits with 0 even after an error.
        if result.returncode or not report.exists():
            reason = first_error(result.stderr) or f"perf_analyzer exited with {result.returncode} and without a report"
            raise Failure(model, protocol, load, reason)


def measure_all(
    plan: Plan,
    models: tuple[str, ...],
    protocols: tuple[str, ...],
    concurrencies: tuple[int, ...],
    shares: tuple[float, ...],
    output: Path,
) -> None:
    """Measure all levels into CSV files, one per model, protocol and kind of load.

    All loads over the first protocol; over the others only the lowest concurrency, which shows a protocol's own cost
    best. Poisson arrivals have `shares` of the highest throughput of the closed loop.

    Raises:
        Failure: A level could not be measured; earlier levels are kept.
    """
    with tempfile.TemporaryDirectory(dir=output, prefix=".parts-") as folder:

        def measure(model: str, protocol: str, loads: Sequence[Load]) -> None:
            parts: list[Path] = []
            for load in loads:
                click.echo(f"{model} over {protocol}, {load}")
                parts.append(Path(folder) / f"{model}-{protocol}-{load.is_poisson}-{load.amount:g}.csv")
                plan.measure(model, protocol, load, parts[-1])
                merge(parts, csv_path(output, model, protocol, is_poisson=load.is_poisson))

        for model in models:
            plan.warm_up(model, protocols[0], Path(folder) / f"{model}.csv")
            measure(model, protocols[0], [Load(False, each) for each in concurrencies])
            closed = parse_csv(csv_path(output, model, protocols[0]), model=model, protocol=protocols[0])
            measure(model, protocols[0], poisson_loads(closed, shares))
            for protocol in protocols[1:]:
                measure(model, protocol, [Load(False, min(concurrencies))])


def poisson_loads(closed: Sequence[Level], shares: Sequence[float]) -> list[Load]:
    """Return Poisson loads with shares of the highest throughput of the closed loop."""
    most = max(level.throughput for level in closed)
    return [Load(True, float(f"{share * most:.3g}")) for share in shares]


def _concurrencies(_: click.Context, __: click.Parameter, text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 1 <= int(word) <= 1000 for word in words):
        raise click.BadParameter(f"{text!r}; allowed: numbers from 1 to 1000, as in 1,2,4")
    return tuple(sorted({int(word) for word in words}))


def _shares(_: click.Context, __: click.Parameter, text: str) -> tuple[float, ...]:
    try:
        shares = sorted({float(word) for word in text.split(",") if word.strip()})
    except ValueError:
        shares = [math.nan]
    if not all(0 < share <= 1 for share in shares):
        raise click.BadParameter(f"{text!r}; allowed: numbers above 0 and up to 1, as in 0.5,0.8, or nothing")
    return tuple(shares)


def _names(_: click.Context, __: click.Parameter, text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _addresses(urls: tuple[str, ...], metrics_url: str | None) -> Addresses:
    addresses: dict[str, str] = {}
    for url in urls:
        scheme, _, rest = url.rpartition("://")
        if scheme not in {"", "http"}:
            raise click.BadParameter(f"{url!r}; allowed: HOST:PORT for gRPC, http://HOST:PORT for HTTP")
        protocol = scheme or "grpc"
        if protocol in addresses:
            raise click.BadParameter(f"{url!r} is a second address for {protocol}; perf_analyzer loads one server")
        addresses[protocol] = rest.rstrip("/")
    if metrics_url:
        addresses["metrics"] = metrics_url.removeprefix("http://").rstrip("/").removesuffix("/metrics")
    return addresses


@click.command(context_settings=SETTINGS)
@click.option(
    "--url",
    "urls",
    multiple=True,
    help="A running server: HOST:PORT for gRPC, http://HOST:PORT for HTTP. Repeat it to measure both."
    "  [default: a server of its own]",
)
@click.option("--metrics-url", help="HOST:PORT of that server's metrics, for the GPU columns.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=PERF / "results", help="CSV folder."
)
@click.option("--concurrency", "concurrencies", callback=_concurrencies, default="1,2,4", show_default=True)
@click.option(
    "--poisson",
    "shares",
    callback=_shares,
    default="0.5,0.8",
    show_default=True,
    help="Rates of Poisson arrivals, as shares of the highest throughput with a fixed concurrency. Empty for none.",
)
@click.option("--requests", type=click.IntRange(min=1), help="Minimum under each load.")
@click.option("--models", callback=_names, default=",".join(REQUESTS), show_default=True)
@click.option(
    "--inputs",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=PERF / "load" / "inputs",
    help="Folder with MODEL.json, in perf_analyzer's --input-data format.",
)
@click.option("--timeout", type=click.FloatRange(min=1), default=600.0, show_default=True, help="Seconds per load.")
def main(
    urls: tuple[str, ...],
    metrics_url: str | None,
    output: Path,
    concurrencies: tuple[int, ...],
    shares: tuple[float, ...],
    requests: int | None,
    models: tuple[str, ...],
    inputs: Path,
    timeout: float,
) -> None:
    """Run perf_analyzer against the models, write CSV files, and print a summary."""
    started = time.monotonic()
    given = _addresses(urls, metrics_url)
    for model in models:
        if not (inputs / f"{model}.json").is_file():
            raise click.BadParameter(f"{model!r}: there is no {inputs / model}.json", param_hint="--models")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    failed: Failure | None = None
    try:
        output.mkdir(parents=True, exist_ok=True)
        for model, protocol, kind in product(models, PROTOCOLS, (False, True)):
            csv_path(output, model, protocol, is_poisson=kind).unlink(missing_ok=True)
        binary = find()
        click.echo(f"perf_analyzer: {binary.path} ({binary.source})")
        with nullcontext(given) if urls else own_server(models, log=output / "server.log") as addresses:
            protocols = tuple(each for each in PROTOCOLS if each in addresses)
            plan = Plan(binary, addresses, inputs, requests, timeout)
            try:
                measure_all(plan, models, protocols, concurrencies, shares, output)
            except Failure as failure:
                failed = failure
        levels = parse_all(output, models)
    except (ServeError, OSError, ValueError) as error:
        fail(error)
    show(summary(levels, failed))
    click.echo(f"CSV files: {output} ({time.monotonic() - started:.0f} s)")
    if failed:
        fail(failed)


if __name__ == "__main__":
    main()
