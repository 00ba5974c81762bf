"""Start and stop of servers on the command line: output, and no leftovers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.request
from pathlib import Path

import psutil
import pytest
from conftest import GENSERVE, ROOT, Server, wait_until

from genserve import Client


def segments(server_pid: int) -> list[Path]:
    return list(Path("/dev/shm").glob(f"genserve-{server_pid}-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_signal_ends_all_processes(tmp_path: Path, number: signal.Signals) -> None:
    server = Server(tmp_path)
    foreground = subprocess.Popen(
        [GENSERVE, "serve", *server.port_arguments, "--model", "rerank"],
        env={**os.environ, "GENSERVE_STATE_DIR": str(tmp_path), "RERANK_MODEL_PATH": "demo/rerank"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert foreground.stdout
    lines = [foreground.stdout.readline().split() for _ in range(3)]
    assert lines == [
        ["http", f"http://127.0.0.1:{server.ports[0]}"],
        ["grpc", f"127.0.0.1:{server.ports[1]}"],
        ["metrics", f"http://127.0.0.1:{server.ports[2]}/metrics"],
    ]
    with Client(server.grpc) as client:
        assert client.rerank("q", ["a"])
        assert {model.name for model in client.models()} == {"rerank", "tasks"}
    family = server.family()
    assert family
    assert segments(foreground.pid)
    os.killpg(foreground.pid, number)  # as a terminal does: to the whole group
    foreground.send_signal(number)  # as a wrapper like timeout does, once more
    assert foreground.wait(60) == 0
    assert not [process for process in family if process.is_running()]
    assert not segments(foreground.pid)
    assert [path.name for path in (tmp_path / f"server-{server.http_port}").iterdir()] == []


@pytest.mark.parametrize("host", ["::1", "::"])
def test_server_listens_on_ipv6(host: str, tmp_path: Path) -> None:
    server = Server(tmp_path)
    started = server.command("serve", "--detach", "--json", "--host", host, *server.port_arguments, "--model", "rerank")
    assert started.returncode == 0, started.stderr
    try:
        addresses = json.loads(started.stdout)
        for protocol in ("grpc", "http"):
            assert "[::1]:" in addresses[protocol]
            with Client(addresses[protocol]) as client:
                assert client.rerank("q", ["a"])
        with urllib.request.urlopen(addresses["metrics"], timeout=10) as answer:
            assert b"nv_inference_request_success" in answer.read()
    finally:
        server.stop()


def test_killed_serve_leaves_no_process(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.start("--model", "rerank")
    process = server.process
    family = server.family()
    process.kill()
    wait_until(lambda: not any(each.is_running() for each in family), what="tritonserver and its children to end")
    server.start("--model", "rerank")  # clears what its predecessor left
    assert not segments(process.pid)
    server.stop()


def test_stop_ends_only_the_server_on_its_port(server: Server, tmp_path: Path) -> None:
    second = Server(server.state)
    second.start("--model", "rerank")
    assert server.command("stop", "--http-port", str(second.http_port), "--json").stdout == (
        json.dumps({"stopped": second.http_port}) + "\n"
    )
    again = server.command("stop", "--http-port", str(second.http_port))
    assert again.returncode == 1
    assert again.stderr.count("\n") == 1
    with Client(server.grpc) as client:
        assert client.health()


def test_second_server_on_the_same_port_is_rejected(server: Server) -> None:
    refused = server.command("serve", *server.port_arguments)
    assert refused.returncode == 1
    assert f"a server runs on HTTP port {server.http_port} already" in refused.stderr
    elsewhere = server.command("serve", "--http-port", str(server.ports[1]))
    assert elsewhere.returncode == 1
    assert f"port {server.ports[1]} on 127.0.0.1: Address already in use" in elsewhere.stderr


def test_model_load_failure_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "rerank"
    broken.mkdir()
    for path in (ROOT / "demo" / "rerank").iterdir():
        if path.name != "model.safetensors":
            (broken / path.name).symlink_to(path)
    (broken / "model.safetensors").write_bytes(b"not weights")
    server = Server(tmp_path / "state", environment={"RERANK_MODEL_PATH": str(broken)})
    refused = server.command("serve", *server.port_arguments, "--model", "rerank")
    assert refused.returncode == 1
    last = refused.stderr.strip().splitlines()[-1]
    assert last.startswith("genserve: rerank: ")
    assert "Traceback" not in last
    running = [each.info["cmdline"] or [] for each in psutil.process_iter(["cmdline"])]
    assert not [each for each in running if str(tmp_path) in " ".join(each)]


def test_command_line_works_against_a_real_server(server: Server, tmp_path: Path) -> None:
    output = tmp_path / "image.webp"
    made = server.command("generate", "a circle", "-o", str(output), "--steps", "2", "--url", server.grpc, "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["steps"] == 2
    assert output.read_bytes()[8:12] == b"WEBP"
    ranked = server.command("rerank", "capital of France", "-", "--url", server.http, "--json", input="Berlin\nParis\n")
    assert [document["index"] for document in json.loads(ranked.stdout)] == [1, 0]
    status = json.loads(server.command("status", "--url", server.grpc, "--url", server.http, "--json").stdout)
    assert [each["ready"] for each in status] == [True, True]
    assert {model["name"] for model in status[0]["models"]} == {"flux", "rerank", "tasks"}
    models = json.loads(server.command("models", "--url", server.http, "--json").stdout)
    assert {model["state"] for model in models} == {"READY"}
    assert server.command("doctor", "--url", server.grpc).returncode == 0
    refused = server.command("generate", "x", "-o", str(output), "--steps", "0", "--url", server.grpc)
    assert refused.returncode == 1
    assert refused.stderr == "genserve: InvalidInput: STEPS is 0; allowed: 1 to 100\n"
