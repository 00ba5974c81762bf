"""Gateways with one database of tasks in front of servers, and a caller that outlives them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import urllib3

from genserve.serve.options import ServeError
from genserve.serve.ports import free_ports
from simulated.load import Request

PAGE = 100
ASK_TIMEOUT_S = 10.0
PATIENCE_S = 180.0
"""Seconds without an answer of any gateway after which a caller gives up."""
PAUSE_S = 0.25

Task = dict[str, Any]


class GatewayProcess:
    """`genserve gateway` that can be killed and started again on its port.

    Args:
        name: Its name.
        folder: Folder of the database and the results, which gateways share.
        urls: Servers.
        database: Address of the database, if it is not a file in the folder.
    """

    def __init__(self, name: str, folder: Path, urls: Sequence[str], database: str | None = None) -> None:
        self.name = name
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / f"{name}.log"
        self._command = [sys.executable, "-m", "genserve", "gateway", "--port", str(port)]
        self._command += ["--tasks", database or f"sqlite:///{folder / 'tasks.db'}", "--results", str(results(folder))]
        self._command += [word for url in urls for word in ("--url", url)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it without waiting for it."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def terminate(self) -> None:
        """Stop it in order.

        Raises:
            ServeError: It does not run, or does not end.
        """
        if self._process is None:
            raise ServeError(f"{self.name} is not running")
        self._process.terminate()
        try:
            self._process.wait(ASK_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise ServeError(f"{self.name} has not ended within {ASK_TIMEOUT_S:g} s") from None
        self._process = None

    def require_running(self) -> None:
        """Check that it has not ended by itself.

        Raises:
            ServeError: It has.
        """
        process = self._process
        if process and process.poll() is not None:
            last = self._log.read_text(errors="replace").strip().rpartition("\n")[2]
            raise ServeError(f"{self.name} ended by itself: {last}")


@contextmanager
def gateways(
    folder: Path, urls: Sequence[str], count: int, database: str | None = None
) -> Iterator[list[GatewayProcess]]:
    """Run gateways with one database inside the block."""
    running = [GatewayProcess(f"gateway-{number}", folder, urls, database) for number in range(count)]
    try:
        for gateway in running:
            gateway.start()
        yield running
    finally:
        for gateway in running:
            gateway.kill()


def results(folder: Path) -> Path:
    """Return the folder of the images."""
    return folder / "results"


class Caller:
    """Caller that asks one gateway after another until one answers.

    Args:
        gateways: The gateways.
    """

    def __init__(self, gateways: Sequence[GatewayProcess]) -> None:
        self._gateways = gateways
        self._http = urllib3.PoolManager(retries=False, timeout=ASK_TIMEOUT_S)
        self._turn = 0

    def ask(self, method: str, path: str, **options: Any) -> urllib3.BaseHTTPResponse:
        """Return the first answer below 500.

        Raises:
            ServeError: No gateway has answered for a long time.
        """
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            self._turn += 1
            gateway = self._gateways[self._turn % len(self._gateways)]
            try:
                answer = self._http.request(method, f"{gateway.url}{path}", **options)
            except urllib3.exceptions.HTTPError:  # It is down, or was killed before it answered.
                gateway.require_running()
                time.sleep(PAUSE_S / len(self._gateways))
                continue
            if answer.status < 500:
                return answer
            time.sleep(PAUSE_S)
        raise ServeError(f"no gateway has answered {method} {path} for {PATIENCE_S:g} s")

    def submit(self, number: int, request: Request) -> str:
        """Submit a task, again until it is accepted, and return its id.

        Raises:
            ServeError: It was refused.
        """
        answer = self.ask("POST", "/v1/tasks", json=request, headers={"Idempotency-Key": f"task-{number}"})
        if answer.status != 202:
            raise ServeError(f"task {number} was refused: {answer.data.decode()}")
        return str(answer.json()["id"])

    def tasks(self) -> list[Task]:
        """Return all tasks."""
        found: list[Task] = []
        query = f"limit={PAGE}"
        while query:
            page = self.ask("GET", f"/v1/tasks?{query}").json()
            found += page["data"]
            query = page["next"] and f"limit={PAGE}&after={page['next']}"
        return found

    def file(self, url: str) -> bytes:
        """Return a file, empty if there is none."""
        answer = self.ask("GET", f"/files/{url.rpartition('/')[2]}")
        return answer.data if answer.status == 200 else b""
