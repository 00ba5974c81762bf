"""`make perf`: runs perf_analyzer against the models at several concurrencies, and leaves CSV files.

Starts a server of its own on free ports, unless --url names one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import click
from rich.console import Console

from genserve.serve.options import ServeError
from perf_binary import Binary, find
from perf_report import PROTOCOLS, Failure, csv_path, first_error, merge, read_all, summary
from perf_server import Addresses, own_server

HERE = Path(__file__).parent
REQUESTS = {"flux": 12, "rerank": 30}
"""At least so many at each concurrency. Each time the sampling takes 3 s or more, as perf_analyzer looks once a second
whether a window has enough: quick requests are many more."""
WINDOWS = 3
"""perf_analyzer judges stability by three windows. All three are wanted, so nothing counts as unstable here."""
ANY_STABILITY = "100000"
TABLE_WIDTH = 100
"""Characters: a pipe or a narrow terminal would otherwise get cut headings."""


@dataclass(frozen=True)
class Plan:
    """How to measure."""

    binary: Binary
    addresses: Addresses
    inputs: Path
    requests: int | None
    timeout_s: float

    def measure(self, model: str, protocol: str, concurrency: int, report: Path) -> None:
        """Measure one level into a CSV file: as many requests as `concurrency` are in flight all the time.

        With --request-count the load would end first and the clock up to a second later, which makes quick requests
        look slower than they are.

        Raises:
            Failure: A request failed, or perf_analyzer did.
        """
        requests = self.requests or REQUESTS.get(model, min(REQUESTS.values()))
        self._run(model, protocol, concurrency, report, requests)

    def warm_up(self, model: str, protocol: str, report: Path) -> None:
        """Send a few requests whose report is not used: the first ones of a server are slower."""
        self._run(model, protocol, 1, report, 1)

    def _run(self, model: str, protocol: str, concurrency: int, report: Path, requests: int) -> None:
        # A window in which the server counts no request is an error to perf_analyzer, and what is in flight when the
        # window opens may have been counted already.
        in_window = max(-(-requests // WINDOWS), concurrency + 1)
        command = [str(self.binary.path), "-m", model, "-i", protocol, "-u", self.addresses[protocol]]
        command += ["--input-data", str(self.inputs / f"{model}.json"), "--concurrency-range", str(concurrency)]
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
            raise Failure(model, protocol, concurrency, f"not done within {self.timeout_s:g} s") from None
        # The one on PATH may be the perf-analyzer package's launcher, which ends with 0 whatever happened.
        if result.returncode or not report.exists():
            reason = first_error(result.stderr) or f"perf_analyzer ended with {result.returncode} and no report"
            raise Failure(model, protocol, concurrency, reason)


def measure_all(
    plan: Plan, models: tuple[str, ...], protocols: tuple[str, ...], concurrencies: tuple[int, ...], output: Path
) -> None:
    """Measure everything into one CSV file for each model and protocol.

    Every concurrency over the first protocol, and the lowest, where a protocol's own cost shows best, over the others.

    Raises:
        Failure: A level could not be measured; what was measured before is kept.
    """
    with tempfile.TemporaryDirectory(dir=output, prefix=".parts-") as folder:
        for model in models:
            plan.warm_up(model, protocols[0], Path(folder) / f"{model}.csv")
            for protocol in protocols:
                parts: list[Path] = []
                for concurrency in concurrencies if protocol == protocols[0] else (min(concurrencies),):
                    click.echo(f"{model} over {protocol} at concurrency {concurrency}")
                    parts.append(Path(folder) / f"{model}-{protocol}-{concurrency}.csv")
                    plan.measure(model, protocol, concurrency, parts[-1])
                    merge(parts, csv_path(output, model, protocol))


def _concurrencies(_: click.Context, __: click.Parameter, text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 1 <= int(word) <= 1000 for word in words):
        raise click.BadParameter(f"{text!r}; allowed: numbers from 1 to 1000, as in 1,2,4")
    return tuple(sorted({int(word) for word in words}))


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


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--url",
    "urls",
    multiple=True,
    help="A running server: HOST:PORT for gRPC, http://HOST:PORT for HTTP. Repeat it to measure both."
    "  [default: start one, and stop it at the end]",
)
@click.option("--metrics-url", help="HOST:PORT of that server's metrics, for the GPU columns.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=HERE / "results", help="CSV folder."
)
@click.option("--concurrency", "concurrencies", callback=_concurrencies, default="1,2,4", show_default=True)
@click.option("--requests", type=click.IntRange(min=1), help="At least so many at each concurrency.")
@click.option("--models", callback=_names, default=",".join(REQUESTS), show_default=True)
@click.option(
    "--inputs",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=HERE / "inputs",
    help="Folder with MODEL.json, in perf_analyzer's --input-data format.",
)
@click.option(
    "--timeout", type=click.FloatRange(min=1), default=600.0, show_default=True, help="Seconds a concurrency."
)
def main(
    urls: tuple[str, ...],
    metrics_url: str | None,
    output: Path,
    concurrencies: tuple[int, ...],
    requests: int | None,
    models: tuple[str, ...],
    inputs: Path,
    timeout: float,
) -> None:
    """Run perf_analyzer against the models, leave CSV files, and print what they say."""
    started = time.monotonic()
    given = _addresses(urls, metrics_url)
    for model in models:
        if not (inputs / f"{model}.json").is_file():
            raise click.BadParameter(f"{model!r}: there is no {inputs / model}.json", param_hint="--models")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    failed: Failure | None = None
    try:
        output.mkdir(parents=True, exist_ok=True)
        for path in (csv_path(output, model, protocol) for model in models for protocol in PROTOCOLS):
            path.unlink(missing_ok=True)
        binary = find()
        click.echo(f"perf_analyzer: {binary.path} ({binary.source})")
        with nullcontext(given) if urls else own_server(models, log=output / "server.log") as addresses:
            protocols = tuple(each for each in PROTOCOLS if each in addresses)
            plan = Plan(binary, addresses, inputs, requests, timeout)
            try:
                measure_all(plan, models, protocols, concurrencies, output)
            except Failure as failure:
                failed = failure
        levels = read_all(output, models)
    except (ServeError, OSError, ValueError) as error:
        _fail(str(error))
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(summary(levels, failed))
    click.echo(f"CSV files: {output} ({time.monotonic() - started:.0f} s)")
    if failed:
        _fail(str(failed))


def _fail(message: str) -> NoReturn:
    click.echo(f"perf: {' '.join(message.split())}", err=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
