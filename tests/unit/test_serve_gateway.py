"""The gateway of `genserve serve`: its port, its start and its restarts, without Triton."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from genserve.serve import gateway as gateway_module
from genserve.serve.gateway import GatewayProcess
from genserve.serve.options import ServeError, ServeOptions
from genserve.serve.ports import check_ports, free_ports

TIMEOUT_S = 60.0


def options(**values: Any) -> ServeOptions:
    http, grpc, metrics, gateway = free_ports(4)
    ports = {"http_port": http, "grpc_port": grpc, "metrics_port": metrics, "gateway_port": gateway}
    return ServeOptions(**{**ports, **values})


def test_address_of_the_gateway_is_listed_only_with_one() -> None:
    chosen = options(host="::", gateway_port=12411)
    assert chosen.addresses["gateway"] == "http://[::1]:12411"
    assert "gateway" not in options(gateway_port=None).addresses


def test_port_in_use_is_reported_with_its_option() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        chosen = options(gateway_port=taken.getsockname()[1])
        with pytest.raises(ServeError, match=r"Address already in use \(choose another with --gateway-port\)"):
            check_ports(chosen)
        check_ports(chosen, chosen.triton_ports)  # as tritonserver does when it restarts behind a running gateway


def test_shared_port_is_reported() -> None:
    (port,) = free_ports(1)
    with pytest.raises(ServeError, match=f"--grpc-port and --gateway-port are both {port}"):
        check_ports(options(grpc_port=port, gateway_port=port))


@pytest.fixture
def running() -> Iterator[GatewayProcess]:
    process = GatewayProcess(options())
    until_listening(process)
    yield process
    process.stop(0.0)


def until_listening(process: GatewayProcess) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not process.is_listening():
        process.keep_running()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ended_gateway_is_started_again(running: GatewayProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    assert running.pid is not None
    first = psutil.Process(running.pid)
    monkeypatch.setattr(gateway_module, "RESTART_PAUSE_S", 3600.0)
    first.kill()
    first.wait(TIMEOUT_S)
    running.keep_running()
    assert running.pid is None, "not more often than the pause allows"
    monkeypatch.setattr(gateway_module, "RESTART_PAUSE_S", 0.0)
    running.keep_running()
    assert running.pid not in {None, first.pid}


def test_stopped_gateway_is_gone(running: GatewayProcess) -> None:
    assert running.pid is not None
    process = psutil.Process(running.pid)
    running.stop(TIMEOUT_S)
    assert not process.is_running()
    running.stop(0.0)  # once more


def test_gateway_that_ignores_sigterm_is_killed(running: GatewayProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_module, "LEAST_DRAIN_S", 0.1)
    assert running.pid is not None
    process = psutil.Process(running.pid)
    process.suspend()
    running.stop(0.0)
    assert not process.is_running()


def test_gateway_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENSERVE_GATEWAY_RATE", "often")
    process = GatewayProcess(options())
    with pytest.raises(ServeError, match=r"^the gateway ended with 2 while it started; its log says why$"):
        until_listening(process)


PARENT = """
import sys, time
from genserve.serve.gateway import GatewayProcess
from genserve.serve.options import ServeOptions
process = GatewayProcess(ServeOptions(gateway_port=int(sys.argv[1])))
while not process.is_listening():
    process.keep_running()
    time.sleep(0.05)
print(process.pid, flush=True)
time.sleep(600)
"""


def test_gateway_ends_with_its_parent(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(port)], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as parent:
        assert parent.stdout
        child = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, signal.SIGKILL)
    child.wait(TIMEOUT_S)
