"""Fixtures: real servers, started on the command line, and their clients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import features
import psutil
import pytest
from features import FeatureError, Features
from prometheus_client.parser import text_string_to_metric_families

from genserve import Client, GenServeError, aio, protocol
from genserve.serve.ports import free_ports

ROOT = Path(__file__).parents[1]
GENSERVE = str(Path(sys.executable).parent / "genserve")
PROTOCOLS = ("grpc", "http")
HANG_TIMEOUT_S = 4.0
COMMAND_TIMEOUT_S = 600.0
"""More than a start takes that compiles."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--features", default="", help=f"comma-separated: {', '.join(features.FEATURES)}")


def pytest_configure(config: pytest.Config) -> None:
    try:
        chosen = Features.parse(config.getoption("--features"))
    except FeatureError as error:
        raise pytest.UsageError(str(error)) from None
    features.chosen = chosen
    os.environ.update(chosen.environment)
    if chosen.names:
        aio.generate_call = protocol.generate_call = chosen.adding(protocol.generate_call)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    excluded = features.chosen.excluded
    for item in items:
        if reason := excluded.get(item.name) or excluded.get(item.name.partition("[")[0]):
            item.add_marker(pytest.mark.skip(reason=reason))


def wait_until(condition: Callable[[], Any], *, timeout_s: float = 60.0, what: str) -> Any:
    """Poll until `condition` returns a true value; fail the test after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.1)
    return value


@dataclass
class Server:
    """A `genserve serve` on free ports."""

    state: Path
    ports: list[int] = field(default_factory=lambda: free_ports(3))
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def http_port(self) -> int:
        return self.ports[0]

    @property
    def http(self) -> str:
        return f"http://localhost:{self.ports[0]}"

    @property
    def grpc(self) -> str:
        return f"localhost:{self.ports[1]}"

    @property
    def metrics(self) -> str:
        return f"http://localhost:{self.ports[2]}/metrics"

    def metric(self, model: str, name: str, **labels: str) -> float:
        """Return a metric of the model's first instance."""
        with urllib.request.urlopen(self.metrics, timeout=10) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        wanted = {"model": model, "instance": f"{model}_0_0", **labels}
        (value,) = [
            sample.value
            for family in families
            for sample in family.samples
            if (sample.name, sample.labels) == (name, wanted)
        ]
        return float(value)

    def url(self, protocol: str) -> str:
        return self.http if protocol == "http" else self.grpc

    def command(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "FLUX_MODEL_PATH": str(ROOT / "demo" / "flux"),
            "RERANK_MODEL_PATH": str(ROOT / "demo" / "rerank"),
            "GENSERVE_STATE_DIR": str(self.state),
            "GENSERVE_LOG_LEVEL": "DEBUG",
            "SCORE_CACHE_BYTES": "0",  # a repeated request must be scored again
            **self.environment,
        }
        return subprocess.run(
            [GENSERVE, *arguments],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_TIMEOUT_S,
            **options,
        )

    @property
    def port_arguments(self) -> list[str]:
        http, grpc, metrics = map(str, self.ports)
        return ["--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics]

    def start(self, *arguments: str) -> None:
        started = self.command("serve", "--detach", *self.port_arguments, *arguments)
        assert started.returncode == 0, started.stderr

    def stop(self) -> None:
        self.command("stop", "--http-port", str(self.http_port))

    @property
    def folder(self) -> Path:
        return self.state / f"server-{self.http_port}"

    @property
    def log(self) -> str:
        return (self.folder / "server.log").read_text(errors="replace")

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(json.loads((self.folder / "server.json").read_text())["pid"])

    def family(self) -> list[psutil.Process]:
        return self.process.children(recursive=True)

    def stub(self, model: str, instance: int = 0) -> psutil.Process:
        name = f"{model}_0_{instance}"
        return self._one(
            lambda line: "triton_python_backend_stub" in line[0] and f"/{model}/1/model.py" in line[1] and name in line
        )

    def worker(self, model: str, instance: int = 0) -> psutil.Process:
        stub = self.stub(model, instance)
        return wait_until(lambda: next(iter(stub.children()), None), what=f"a worker of {model}")

    def _one(self, matches: Callable[[list[str]], bool]) -> psutil.Process:
        def find() -> psutil.Process | None:
            for process in self.family():
                try:
                    line = process.cmdline()
                except psutil.Error:
                    continue
                if len(line) > 1 and matches(line):
                    return process
            return None

        found: psutil.Process = wait_until(find, what="the process")
        return found

    def wait_ready(self) -> None:
        """Wait until all models are ready."""
        with Client(self.grpc) as client:

            def ready() -> bool:
                try:
                    return client.health()
                except GenServeError:
                    return False

            wait_until(ready, what="the server to be ready")


def serving(tmp_path_factory: pytest.TempPathFactory, *arguments: str, **environment: str) -> Iterator[Server]:
    """Run a server for the lifetime of a fixture."""
    server = Server(tmp_path_factory.mktemp("state"), environment=environment)
    server.start(*arguments)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from serving(tmp_path_factory)


@pytest.fixture(scope="session")
def running_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two instances of flux with one CPU thread each and a short hang timeout."""
    environment = {"FLUX_WORKERS": "2", "OMP_NUM_THREADS": "1", "HANG_TIMEOUT": str(HANG_TIMEOUT_S)}
    yield from serving(tmp_path_factory, "--model", "flux", "--model", "tasks", **environment)


@pytest.fixture
def pair(running_pair: Server) -> Server:
    running_pair.wait_ready()
    return running_pair


@pytest.fixture
def server(running_server: Server) -> Server:
    running_server.wait_ready()
    return running_server


@pytest.fixture(params=PROTOCOLS)
def client(request: pytest.FixtureRequest, server: Server) -> Iterator[Client]:
    with Client(server.url(request.param), timeout=120) as client:
        yield client


@pytest.fixture
def grpc_client(server: Server) -> Iterator[Client]:
    with Client(server.grpc, timeout=120) as client:
        yield client
