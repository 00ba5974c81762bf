"""perf_analyzer's CSV reports: parsing, merging, and the summary table."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from rich.table import Table

PROTOCOLS = ("grpc", "http")
MICROSECONDS_PER_MS = 1000.0
CONCURRENCY, RATE = "Concurrency", "Request Rate"


@dataclass(frozen=True, order=True)
class Load:
    """A number of requests in flight all the time, or requests that arrive at random at a rate."""

    is_poisson: bool
    amount: float
    """Requests in flight, or requests per second."""

    @property
    def flags(self) -> list[str]:
        """perf_analyzer's options."""
        if self.is_poisson:
            return ["--request-rate-range", f"{self.amount:g}", "--request-distribution", "poisson"]
        return ["--concurrency-range", f"{self.amount:g}"]

    def __str__(self) -> str:
        return f"Poisson, {self.amount:.2f}/s" if self.is_poisson else f"{self.amount:g} in flight"


@dataclass(frozen=True)
class Level:
    """One model over one protocol under one load; times in milliseconds."""

    model: str
    protocol: str
    load: Load
    throughput: float
    """Responses per second."""
    p50_ms: float
    p95_ms: float
    p99_ms: float
    queue_ms: float
    """Mean wait in Triton's queue."""


class Failure(Exception):
    """A level that could not be measured."""

    def __init__(self, model: str, protocol: str, load: Load, reason: str) -> None:
        super().__init__(f"{model} over {protocol}, {load}: {reason}")
        self.model, self.protocol, self.load = model, protocol, load


def first_error(errors: str) -> str:
    """Return the cause of a failure from perf_analyzer's error output, or an empty text."""
    lines = [line.strip() for line in errors.splitlines() if line.strip() and not line.startswith("WARNING:")]
    requests = [line.partition("had error:")[2].strip() for line in lines if "had error:" in line]
    return next(iter(requests or lines), "").removeprefix("error: ")


def csv_path(folder: Path, model: str, protocol: str, *, is_poisson: bool = False) -> Path:
    """Return the file for all closed or Poisson loads of one model over one protocol."""
    return folder / f"{model}-{protocol}{'-poisson' if is_poisson else ''}.csv"


def parse_csv(path: Path, *, model: str, protocol: str) -> list[Level]:
    """Return the levels of one file, by rising load.

    Raises:
        ValueError: The file is not a report of perf_analyzer, or has no measurements.
    """
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    if not lines:
        raise ValueError(f"{path} has no measurement")
    try:
        levels = [_level(line, model, protocol) for line in lines]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is not a report of perf_analyzer") from None
    return sorted(levels, key=lambda level: level.load)


def parse_all(folder: Path, models: Iterable[str]) -> list[Level]:
    """Return the levels of all files in the folder."""
    levels: list[Level] = []
    for model, protocol, kind in product(models, PROTOCOLS, (False, True)):
        path = csv_path(folder, model, protocol, is_poisson=kind)
        if path.exists():
            levels += parse_csv(path, model=model, protocol=protocol)
    return levels


def _level(line: dict[str, str], model: str, protocol: str) -> Level:
    def milliseconds(column: str) -> float:
        return float(line[column]) / MICROSECONDS_PER_MS

    column = RATE if RATE in line else CONCURRENCY
    return Level(
        model=model,
        protocol=protocol,
        load=Load(column == RATE, float(line[column])),
        throughput=float(line["Inferences/Second"]),
        p50_ms=milliseconds("p50 latency"),
        p95_ms=milliseconds("p95 latency"),
        p99_ms=milliseconds("p99 latency"),
        queue_ms=milliseconds("Server Queue"),
    )


def merge(parts: Iterable[Path], target: Path) -> None:
    """Write the header of the first part and the measurements of all parts to one file."""
    lines: list[str] = []
    for part in parts:
        header, *measurements = part.read_text().splitlines() or [""]
        lines += [*([] if lines else [header]), *filter(None, measurements)]
    target.write_text("".join(f"{line}\n" for line in lines))


def summary(levels: Iterable[Level], failed: Failure | None = None) -> Table:
    """Return a table with one line per level, and one for the failed level, if any."""
    table = Table()
    for column in ("Model", "Protocol"):
        table.add_column(column)
    for column in ("Load", "Requests/s", "p50 ms", "p95 ms", "p99 ms", "Queue ms", "Errors"):
        table.add_column(column, justify="right", no_wrap=True)
    model = None
    for level in levels:
        if model not in {None, level.model}:
            table.add_section()
        model = level.model
        times = (level.p50_ms, level.p95_ms, level.p99_ms, level.queue_ms)
        numbers = (f"{level.throughput:.2f}", *(f"{each:,.1f}" for each in times))
        # perf_analyzer ends a level at its first error without a report: a reported level has no errors.
        table.add_row(level.model, level.protocol, str(level.load), *numbers, "0")
    if failed:
        table.add_row(failed.model, failed.protocol, str(failed.load), *"-----", "failed")
    return table
