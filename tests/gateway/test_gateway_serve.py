"""`genserve serve --gateway-port`: one gateway per server, replaced when it dies, gone when the server is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import Server, wait_until
from gateway_app import RERANK

from genserve.gateway.keys import digest_of
from genserve.serve.ports import free_ports


class ServerWithGateway(Server):
    """Server of rerank, with a gateway that needs a key."""

    @property
    def gateway_port(self) -> int:
        return self.ports[3]

    @property
    def gateway(self) -> str:
        return f"http://127.0.0.1:{self.gateway_port}"

    @property
    def gateway_process(self) -> psutil.Process | None:
        for process in self.process.children():
            try:
                if "gateway" in process.cmdline():
                    return process
            except psutil.Error:
                continue
        return None

    @property
    def port_arguments(self) -> list[str]:
        http, grpc, metrics, gateway = map(str, self.ports)
        return ["--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics, "--gateway-port", gateway]

    def is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self.gateway}/health", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def rerank(self) -> int:
        return httpx.post(f"{self.gateway}/v2/rerank", json=RERANK, headers={"x-api-key": "mine"}).status_code


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerWithGateway]:
    folder = tmp_path_factory.mktemp("state")
    environment = {"GENSERVE_GATEWAY_KEYS": f"alice {digest_of('mine')}"}
    server = ServerWithGateway(folder, ports=free_ports(4), environment=environment)
    started = server.command("serve", "--detach", "--json", *server.port_arguments, "--model", "rerank")
    assert started.returncode == 0, started.stderr
    try:
        assert json.loads(started.stdout)["gateway"] == server.gateway
        yield server
    finally:
        server.stop()


def test_gateway_answers_as_soon_as_serve_says_so(served: ServerWithGateway) -> None:
    assert served.is_healthy()
    assert served.rerank() == 200
    assert httpx.get(f"{served.gateway}/status").status_code == 401, "the environment has its options"
    assert "route=/v2/rerank method=POST status=200" in served.log


def test_killed_gateway_is_replaced(served: ServerWithGateway) -> None:
    first, tritonserver = served.gateway_process, served.stub("rerank").parent()
    assert first is not None
    first.kill()
    wait_until(lambda: served.gateway_process not in {None, first} and served.is_healthy(), what="another gateway")
    assert served.rerank() == 200
    assert served.stub("rerank").parent() == tritonserver, "tritonserver has nothing to do with it"
    assert 'event="restarting the gateway" cause="the gateway ended with -9"' in served.log


def test_gateway_outlives_tritonserver(served: ServerWithGateway) -> None:
    gateway, stub = served.gateway_process, served.stub("rerank")
    tritonserver = stub.parent()
    assert tritonserver is not None
    tritonserver.kill()
    wait_until(lambda: not served.is_healthy(), what="the gateway to notice")
    answer = httpx.get(f"{served.gateway}/health")
    assert answer.status_code in {200, 503}
    wait_until(served.is_healthy, what="tritonserver to be replaced")
    assert served.rerank() == 200
    assert served.gateway_process == gateway


def test_gateway_without_keys_file_does_not_start(served: ServerWithGateway, tmp_path: Path) -> None:
    other = ServerWithGateway(tmp_path, ports=free_ports(4), environment={"GENSERVE_GATEWAY_KEYS": "/nowhere/keys"})
    refused = other.command("serve", *other.port_arguments, "--model", "rerank")
    assert refused.returncode == 1
    assert "genserve: cannot read /nowhere/keys: No such file or directory\n" in refused.stderr
    assert refused.stderr.splitlines()[-1].startswith("genserve: the gateway ended with 1 while it started")
    same = ServerWithGateway(tmp_path, ports=[*free_ports(3), served.gateway_port])
    refused = same.command("serve", *same.port_arguments)
    assert f"port {served.gateway_port} on 127.0.0.1: Address already in use (choose another with --gateway-port)" in (
        refused.stderr
    )


def test_killed_serve_leaves_no_process(served: ServerWithGateway) -> None:
    process, family = served.process, served.family()
    assert any("gateway" in each.cmdline() for each in family)
    process.kill()
    wait_until(lambda: not any(each.is_running() for each in family), what="the gateway and tritonserver to end")
    again = served.command("serve", "--detach", *served.port_arguments, "--model", "rerank")
    assert again.returncode == 0, again.stderr
    family = served.family()
    assert served.command("stop", "--http-port", str(served.http_port)).returncode == 0
    assert not [each for each in family if each.is_running()]
    assert not (served.folder / "server.json").exists()
