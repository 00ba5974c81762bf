"""Random faults in a server under mixed load: every request must get the right response.

Starts a server, sends a set of requests once without faults, and then sends them over gRPC and HTTP while processes
below `genserve serve` are killed or stopped at random. The report has the faults, the longest time without a response
per model, and the callers' results.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import psutil
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import COUNT, SETTINGS, fail, show
from genserve import Client, GenServeError
from genserve.serve.options import ServeError
from genserve.serve.own_server import own_server
from genserve.serve.process import SHM_FOLDER, SHM_PREFIX

HANG_TIMEOUT_S = 5.0
RETRY_FOR_S = 300.0
TIMEOUT_S = 400.0
READY_SHARE = 0.7
"""Share of the faults that wait until the server is ready; the others may occur while it starts."""
PAUSE_S = (1.0, 8.0)
"""Seconds before a fault, drawn uniformly."""
SAME_MODEL_PAUSE_S = 20.0
"""Seconds between two faults of one model's worker: a request in flight at two crashes fails by design."""
SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP)
TARGETS = ("flux worker", "rerank worker", "flux stub", "rerank stub", "tasks stub", "tritonserver")
MARK_ENV = "GENSERVE_RANDOM_FAULTS"
"""Variable in the environment of every process of this run."""
WORDS = ("capital", "river", "mountain", "France", "Berlin", "moon", "garden", "violin", "engine", "harvest")

Protocol = Literal["grpc", "http"]
Answer = tuple[Any, ...]


@dataclass(frozen=True)
class Fault:
    """A signal to one process."""

    at_s: float
    target: str
    signal: str
    pid: int


@dataclass
class Report:
    """Faults and results of a run.

    Attributes:
        answered: Right responses, by model and protocol.
        wrong: Responses that differ from the one without faults.
        errors: The callers' errors, by class and message.
        longest_s: Longest latency of a request.
        gap_s: Longest time without a response, by model.
        leftover: Processes and shared memory segments left after the server's end.
    """

    seed: int
    seconds: float
    faults: list[Fault] = field(default_factory=list)
    sent: int = 0
    answered: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    gap_s: dict[str, float] = field(default_factory=dict)
    leftover: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Return True if every request got one right response and nothing is left over."""
        return not (self.wrong or self.errors or self.leftover) and self.sent == self.answered.total() > 0


class Load:
    """Callers that repeat the same requests.

    Args:
        addresses: The server's addresses.
        report: Report to which the callers add their results.
        callers: Requests in flight per model and protocol.
        seed: Seed of the requests.
    """

    def __init__(self, addresses: dict[str, str], report: Report, *, callers: int, seed: int) -> None:
        self._report = report
        self._callers = callers
        self._seed = seed
        self._clients: dict[Protocol, Client] = {
            "grpc": Client(addresses["grpc"], timeout=TIMEOUT_S, retry_for=RETRY_FOR_S),
            "http": Client(f"http://{addresses['http']}", timeout=TIMEOUT_S, retry_for=RETRY_FOR_S),
        }
        self._calls: dict[str, list[Callable[[Client], Answer]]] = {"flux": _images(seed), "rerank": _rankings(seed)}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._answered_at: dict[str, float] = {}
        self._expected: dict[str, list[Answer]] = {}

    def ask_once(self) -> None:
        """Send each request once, before the faults begin."""
        client = self._clients["grpc"]
        self._expected = {model: [call(client) for call in calls] for model, calls in self._calls.items()}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Send requests inside the block; its end waits for the last responses."""
        callers = [
            threading.Thread(target=self._call, args=(model, protocol, number))
            for model in self._calls
            for protocol in self._clients
            for number in range(self._callers)
        ]
        self._answered_at = dict.fromkeys(self._calls, time.monotonic())
        for caller in callers:
            caller.start()
        try:
            yield
        finally:
            self._stop.set()
            for caller in callers:
                caller.join()
            for client in self._clients.values():
                client.close()

    def _call(self, model: str, protocol: Protocol, number: int) -> None:
        draw = random.Random(f"{self._seed} {model} {protocol} {number}")
        while not self._stop.is_set():
            index = draw.randrange(len(self._calls[model]))
            started = time.monotonic()
            try:
                answer = self._calls[model][index](self._clients[protocol])
            except GenServeError as error:
                outcome: Answer | str = f"{model} over {protocol}: {type(error).__name__}: {error}"
            else:
                outcome = answer
            self._note(model, protocol, outcome, self._expected[model][index], started)

    def _note(self, model: str, protocol: str, outcome: Answer | str, expected: Answer, started: float) -> None:
        now = time.monotonic()
        with self._lock:
            report = self._report
            report.sent += 1
            report.longest_s = max(report.longest_s, now - started)
            if isinstance(outcome, str):
                report.errors[outcome] += 1
                return
            report.gap_s[model] = max(report.gap_s.get(model, 0.0), now - self._answered_at[model])
            self._answered_at[model] = now
            report.answered[f"{model} over {protocol}"] += 1
            report.wrong += not _same(outcome, expected)


def _images(seed: int) -> list[Callable[[Client], Answer]]:
    draw = random.Random(f"images {seed}")

    def make(number: int, size: int, steps: int) -> Callable[[Client], Answer]:
        def call(client: Client) -> Answer:
            image = client.generate(f"picture {number}", seed=number, steps=steps, height=size, width=size).image
            return (np.asarray(image).astype(int),)

        return call

    return [make(number, draw.choice((64, 128)), draw.randint(2, 20)) for number in range(8)]


def _rankings(seed: int) -> list[Callable[[Client], Answer]]:
    draw = random.Random(f"rankings {seed}")

    def make(query: str, documents: Sequence[str]) -> Callable[[Client], Answer]:
        def call(client: Client) -> Answer:
            ranked = client.rerank(query, documents)
            return (np.array([entry.score for entry in sorted(ranked, key=lambda entry: entry.index)]),)

        return call

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(3, 60)))

    return [make(text(), [text() for _ in range(draw.randint(1, 16))]) for _ in range(16)]


def _same(answer: Answer, expected: Answer) -> bool:
    """Return True for levels within 1 and scores within 1e-4: the limits for a different batch."""
    (got,), (wanted,) = answer, expected
    return got.shape == wanted.shape and bool(np.abs(got - wanted).max() <= (1 if got.dtype == int else 1e-4))


class Faults:
    """Random signals to the server's processes.

    Args:
        mark: Value of `MARK_ENV` in this run's processes.
        url: The server's HTTP address.
        seed: Seed of targets, times and signals.
    """

    def __init__(self, mark: str, url: str, *, seed: int) -> None:
        self._mark = mark
        self._url = url
        self._draw = random.Random(f"faults {seed}")
        self._worker_hit: dict[str, float] = {}

    def hit(self, *, since: float) -> Fault:
        """Pause, then kill or stop one process, and return the fault."""
        if self._draw.random() < READY_SHARE:
            self._wait_ready()
        time.sleep(self._draw.uniform(*PAUSE_S))
        number = self._draw.choice(SIGNALS)
        while True:
            target = self._draw.choice(TARGETS)
            now = time.monotonic()
            is_worker = target.endswith("worker")
            if is_worker and now - self._worker_hit.get(target, -SAME_MODEL_PAUSE_S) < SAME_MODEL_PAUSE_S:
                continue
            process = self.find(target)
            if process is None:  # its server is being restarted
                time.sleep(0.2)
                continue
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue
            if is_worker:
                self._worker_hit[target] = now
            return Fault(round(now - since, 1), target, number.name, process.pid)

    def _wait_ready(self) -> None:
        with Client(self._url) as client:
            while not client.health():
                time.sleep(0.2)

    def find(self, target: str) -> psutil.Process | None:
        """Return the target's process, or None."""
        model, _, kind = target.partition(" ")
        for process, line in self.processes():
            if kind == "worker":
                found = "genserve_backend.worker.process" in line and model == _model_of(process)
            elif kind == "stub":
                found = "triton_python_backend_stub" in line[0] and f"/{model}/1/model.py" in " ".join(line)
            elif kind == "serve":
                found = line[1:4] == ["-m", "genserve", "serve"]
            else:
                found = line[0].endswith("/tritonserver")
            if found:
                return process
        return None

    def processes(self) -> Iterator[tuple[psutil.Process, list[str]]]:
        """Yield all processes of this run with their command lines."""
        for process in psutil.process_iter(["cmdline", "environ", "status"]):
            line, environment = process.info["cmdline"], process.info["environ"] or {}
            if line and environment.get(MARK_ENV) == self._mark and process.pid != os.getpid():
                yield process, line


def _model_of(worker: psutil.Process) -> str | None:
    try:
        parent = worker.parent()
        stub = " ".join(parent.cmdline()) if parent else ""
    except psutil.Error:
        return None
    return next((model for model in ("flux", "rerank") if f"/{model}/1/model.py" in stub), None)


def run(*, seconds: float, count: int, seed: int, callers: int, log: Path) -> Report:
    """Run the whole experiment.

    Args:
        seconds: Minimum length of the load with faults.
        count: Minimum number of faults.
        seed: Seed of requests and faults.
        callers: Requests in flight per model and protocol.
        log: File for a copy of the server's log.

    Raises:
        ServeError: The server did not start.
    """
    mark = f"{os.getpid()}-{seed}"
    report = Report(seed, seconds)
    environment = {"HANG_TIMEOUT": str(HANG_TIMEOUT_S), MARK_ENV: mark}
    with own_server(("flux", "rerank", "tasks"), log=log, environment=environment) as addresses:
        faults = Faults(mark, f"http://{addresses['http']}", seed=seed)
        load = Load(dict(addresses), report, callers=callers, seed=seed)
        load.ask_once()
        server = faults.find("genserve serve")
        if server is None:
            raise ServeError("the server ended before the first fault")
        started = time.monotonic()
        with load.running():
            while time.monotonic() - started < seconds or len(report.faults) < count:
                report.faults.append(faults.hit(since=started))
            report.seconds = time.monotonic() - started
    report.leftover = [f"process {process.pid}: {' '.join(line)[:120]}" for process, line in faults.processes()]
    report.leftover += [str(path) for path in sorted(SHM_FOLDER.glob(f"{SHM_PREFIX}-{server.pid}-*"))]
    return report


def table(report: Report) -> Table:
    """Return the report as a table."""
    result = Table("", "", title=f"{report.seconds:.0f} s of load, seed {report.seed}", show_header=False)
    hits = Counter(f"{fault.signal} {fault.target}" for fault in report.faults)
    result.add_row("faults", f"{len(report.faults)}: " + ", ".join(f"{hits[hit]} {hit}" for hit in sorted(hits)))
    result.add_row("requests", str(report.sent))
    for name in sorted(report.answered):
        result.add_row(f"right responses, {name}", str(report.answered[name]))
    result.add_row("wrong responses", str(report.wrong))
    for message, count in report.errors.most_common():
        result.add_row("error", f"{count} x {message}")
    result.add_row("longest request", f"{report.longest_s:.1f} s")
    for model, gap in sorted(report.gap_s.items()):
        result.add_row(f"longest time without a response, {model}", f"{gap:.1f} s")
    result.add_row("left over", ", ".join(report.leftover) or "nothing")
    return result


@click.command(context_settings=SETTINGS)
@click.option(
    "--seconds", type=click.FloatRange(min=1), default=300.0, show_default=True, help="Minimum length of the load."
)
@click.option("--faults", "count", type=COUNT, default=20, show_default=True, help="Minimum number of faults.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of requests and faults.")
@click.option(
    "--callers",
    type=click.IntRange(1, 64),
    default=3,
    show_default=True,
    help="Requests in flight per model and protocol.",
)
@click.option("--log", type=click.Path(path_type=Path), help="File for a copy of the server's log.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(seconds: float, count: int, seed: int, callers: int, log: Path | None, as_json: bool) -> None:
    """Kill and stop processes of a server under load; fail unless every request gets the right response."""
    with tempfile.TemporaryDirectory(prefix="genserve-faults-") as folder:
        try:
            log = log or Path(folder) / "server.log"
            report = run(seconds=seconds, count=count, seed=seed, callers=callers, log=log)
        except (ServeError, GenServeError) as error:
            fail(error)
    if as_json:
        click.echo(json.dumps(asdict(report)))
    else:
        show(table(report))
    sys.exit(not report.passed)


if __name__ == "__main__":
    main()
