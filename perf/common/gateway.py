"""A `genserve gateway` in front of servers for the length of one run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from genserve.serve.options import ServeError
from genserve.serve.ports import free_ports

START_S = 60.0
POLL_S = 0.1


@contextmanager
def own_gateway(*urls: str, log: Path) -> Iterator[str]:
    """Run a gateway on a free port inside the block, and yield its address as HOST:PORT.

    Args:
        urls: Addresses of the servers behind it.
        log: File for its log.

    Raises:
        ServeError: The gateway did not become ready.
    """
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "genserve", "gateway", "--port", str(port)]
    command += [word for url in urls for word in ("--url", url)]
    with tempfile.TemporaryDirectory(prefix="genserve-perf-") as state, log.open("wb") as file:
        environment = {**os.environ, "GENSERVE_STATE_DIR": state}
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        try:
            address = f"127.0.0.1:{port}"
            _wait_until_ready(process, address, log)
            yield address
        finally:
            process.terminate()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://{address}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(POLL_S)
    raise ServeError(f"the gateway did not become ready; its log is {log}")
