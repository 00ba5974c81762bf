"""A `genserve gateway` process in front of real servers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from conftest import GENSERVE, wait_until

from genserve.serve.ports import free_ports


@dataclass(frozen=True)
class Gateway:
    """Running gateway."""

    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=10).status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def running_gateway(folder: Path, *urls: str, options: tuple[str, ...] = ()) -> Iterator[Gateway]:
    """Run a gateway in front of the servers with these addresses."""
    (port,) = free_ports(1)
    gateway = Gateway(port, folder / f"gateway-{port}.log")
    addresses = [option for url in urls for option in ("--url", url)]
    with gateway.log.open("w") as log:
        process = subprocess.Popen(
            [GENSERVE, "gateway", "--port", str(port), *addresses, *options],
            env={**os.environ, "GENSERVE_STATE_DIR": str(folder)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(lambda: gateway.is_ready() or process.poll() is not None, what="the gateway to be ready")
        assert process.poll() is None, gateway.log.read_text()
        yield gateway
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
