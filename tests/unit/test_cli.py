"""The command line: what each verb prints, and the one line that says why it failed."""

from __future__ import annotations

import io
import json
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import genserve.client
from genserve.cli import main
from genserve.errors import GenServeError, InvalidInput, QueueFull
from genserve.protocol import Call, Outputs
from genserve.serve import server as server_module
from genserve.serve.options import ServeError, ServeOptions
from genserve.serve.server import start_detached
from genserve.serve.state import ServerState
from genserve.serve.triton import Triton

SHIPPED = Path(__file__).parents[2] / "model_repository"
NOBODY = ("localhost:1", "http://localhost:1")
"""Addresses where nothing listens."""

Invoke = Callable[..., Result]


@pytest.fixture(autouse=True)
def untouched_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keeps the verbs away from this machine's state, and puts signals and logging back as they were."""
    monkeypatch.setenv("GENSERVE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("GENSERVE_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("GENSERVE_URL", "FLUX_GPUS", "RERANK_GPUS", "WORKERS", "FLUX_WORKERS"):
        monkeypatch.delenv(name, raising=False)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    root = logging.getLogger()
    logging_handlers, level = root.handlers[:], root.level
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    root.handlers[:] = logging_handlers
    root.setLevel(level)


@pytest.fixture
def invoke() -> Invoke:
    def invoke(*arguments: str, **options: Any) -> Result:
        return CliRunner().invoke(main, list(arguments), prog_name="genserve", **options)

    return invoke


def failure(result: Result) -> str:
    """The one line on stderr, but for the log's, of a verb that failed."""
    assert result.exit_code == 1, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("time=")]
    assert line.startswith("genserve: ")
    return line.removeprefix("genserve: ")


@pytest.mark.parametrize("verb", ["", *main.commands])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_verb_explains_itself(verb: str, flag: str, invoke: Invoke) -> None:
    result = invoke(*filter(None, [verb]), flag)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: genserve {verb}".rstrip())
    assert result.stderr == ""


def test_the_verbs_of_the_contract_are_there(invoke: Invoke) -> None:
    assert {"serve", "stop", "generate", "rerank", "status", "models", "doctor"} <= set(main.commands)
    assert invoke("--version").stdout.startswith("genserve")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["--nonsense"],
        ["generate"],
        ["generate", "a cat"],
        ["generate", "a cat", "-o", "x.png", "--priority", "urgent"],
        ["generate", "a cat", "-o", "x.png", "--steps", "four"],
        ["generate", "a cat", "-o", "/"],
        ["rerank", "query"],
        ["rerank", "query", "/no/such/file"],
        ["rerank", "query", "-", "--top-n", "0"],
        ["serve", "--http-port", "0"],
        ["serve", "--grpc-port", "65536"],
        ["serve", "--gpus", "all"],
        ["serve", "--gpus", "-1"],
        ["serve", "--instances", "flux"],
        ["serve", "--instances", "flux=0"],
        ["serve", "--instances", "flux=many"],
        ["stop", "--http-port", "none"],
    ],
    ids=" ".join,
)
def test_bad_options_are_refused_before_anything_happens(arguments: list[str], invoke: Invoke, tmp_path: Path) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error: " in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


# Calling a server.


@pytest.mark.parametrize("url", NOBODY, ids=["grpc", "http"])
@pytest.mark.parametrize(
    "arguments",
    [["generate", "a cat", "-o", "x.png"], ["rerank", "q", "-"], ["models"], ["models", "--json"]],
    ids=" ".join,
)
def test_an_unreachable_server_is_one_line(arguments: list[str], url: str, invoke: Invoke) -> None:
    result = invoke(*arguments, "--url", url, input="document\n")
    message = failure(result)
    assert message.startswith("ServerUnavailable: ")
    assert url in message
    assert result.stdout == ""


@pytest.mark.parametrize("url", NOBODY, ids=["grpc", "http"])
def test_status_and_doctor_show_an_unreachable_server_and_fail(url: str, invoke: Invoke) -> None:
    result = invoke("status", "--url", url)
    assert result.stdout == f"{url}  not reachable\n"
    assert failure(result) == f"{url} is not reachable"
    result = invoke("status", "--json", "--url", url)
    assert failure(result) == f"{url} is not reachable"
    (shown,) = json.loads(result.stdout)
    assert (shown["url"], shown["live"], shown["ready"]) == (url, False, False)
    result = invoke("doctor", "--url", url)
    assert "not reachable" in result.stdout
    assert failure(result) == "1 of 1 checks failed"


def test_the_address_comes_from_the_environment(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENSERVE_URL", ",".join(NOBODY))
    result = invoke("status")
    assert result.stdout.splitlines() == [f"{url}  not reachable" for url in NOBODY]
    assert invoke("status", "--url", "localhost:2").stdout == "localhost:2  not reachable\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models", "--url", "nonsense"], "InvalidInput: url is 'nonsense'; allowed: "),
        (["generate", "x", "-o", "x.png", "--timeout", "-1"], "InvalidInput: timeout is -1.0; allowed: "),
        (["generate", "x", "-o", "x.png", "--timeout", "nan"], "InvalidInput: timeout is nan; allowed: "),
        (["generate", "x", "-o", "x.png", "--steps", str(2**31)], "InvalidInput: STEPS cannot be sent as INT32: "),
        (["rerank", "q", "-"], "InvalidInput: DOCUMENTS is an empty list; allowed: "),
    ],
    ids=["url", "negative-timeout", "nan-timeout", "steps", "no-documents"],
)
def test_what_the_client_refuses_is_one_line(arguments: list[str], message: str, invoke: Invoke) -> None:
    assert failure(invoke(*arguments, input="\n \n")).startswith(message)


class FakeServer:
    """Answers every request, or fails every one."""

    error: GenServeError | None = None
    calls: list[Call]

    def __init__(self, url: str) -> None:
        self.url = url

    def infer(self, call: Call, timeout_s: float) -> Outputs:
        self.calls.append(call)
        if self.error:
            raise self.error
        if call.model == "rerank":
            count = call.inputs["DOCUMENTS"].shape[1]
            return {"SCORES": np.linspace(0.25, 0.75, count, dtype=np.float32)[None]}
        buffer = io.BytesIO()
        Image.new("RGB", (64, 96)).save(buffer, "PNG")
        info = {"width": 64, "height": 96, "steps": 4, "elapsed_time": 1.234, "device": "cpu"}
        return {
            "IMAGE": np.array([[buffer.getvalue()]], dtype=np.object_),
            "SEED": np.array([[7]], dtype=np.int64),
            "INFO": np.array([[json.dumps(info).encode()]], dtype=np.object_),
        }

    def close(self) -> None:
        pass


@pytest.fixture
def fake_server(monkeypatch: pytest.MonkeyPatch) -> type[FakeServer]:
    monkeypatch.setattr(genserve.client, "connect", FakeServer)
    monkeypatch.setattr(FakeServer, "error", None)
    monkeypatch.setattr(FakeServer, "calls", [], raising=False)
    return FakeServer


def test_generate_writes_the_file_and_says_so(fake_server: type[FakeServer], invoke: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    result = invoke("generate", "a cat", "-o", str(file), "--seed", "7", "--steps", "4", "--priority", "high")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{file}: 64 x 96, 4 steps, seed 7, 1.23 s on cpu\n"
    assert Image.open(file).size == (64, 96)
    (call,) = fake_server.calls
    sent = {name: array.item() for name, array in call.inputs.items() if name != "TASK_ID"}
    assert sent == {"PROMPT": b"a cat", "SEED": 7, "STEPS": 4, "FORMAT": b"png"}
    assert call.priority == 1


def test_generate_prints_json(fake_server: type[FakeServer], invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("generate", "a cat", "-o", str(tmp_path / "x.png"), "--json")
    assert json.loads(result.stdout) == {
        "file": str(tmp_path / "x.png"),
        "width": 64,
        "height": 96,
        "steps": 4,
        "elapsed_time": 1.234,
        "device": "cpu",
    }


@pytest.mark.parametrize(
    ("name", "option", "sent"),
    [
        ("x.png", None, b"png"),
        ("x.jpg", None, b"jpeg"),
        ("x.JPEG", None, b"jpeg"),
        ("x.webp", None, b"webp"),
        ("x", None, b"png"),
        ("x.png", "webp", b"webp"),
    ],
    ids=str,
)
def test_the_files_name_decides_the_format(
    name: str, option: str | None, sent: bytes, fake_server: type[FakeServer], invoke: Invoke, tmp_path: Path
) -> None:
    invoke("generate", "a cat", "-o", str(tmp_path / name), *(["--format", option] if option else []))
    assert fake_server.calls[0].inputs["FORMAT"].item() == sent


def test_a_file_that_cannot_be_written_is_one_line(
    fake_server: type[FakeServer], invoke: Invoke, tmp_path: Path
) -> None:
    file = tmp_path / "no-such-folder" / "x.png"
    assert failure(invoke("generate", "x", "-o", str(file))) == f"cannot write {file}: No such file or directory"


@pytest.mark.parametrize(
    "error", [InvalidInput("STEPS is 0;\nallowed: 1 to 100"), QueueFull("full")], ids=lambda error: type(error).__name__
)
def test_a_servers_error_is_one_line(
    error: GenServeError, fake_server: type[FakeServer], invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_server, "error", error)
    message = failure(invoke("generate", "x", "-o", str(tmp_path / "x.png")))
    assert message == f"{type(error).__name__}: {' '.join(str(error).split())}"
    assert not (tmp_path / "x.png").exists()


def test_rerank_reads_lines_and_prints_the_best_first(
    fake_server: type[FakeServer], invoke: Invoke, tmp_path: Path
) -> None:
    file = tmp_path / "documents.txt"
    file.write_bytes("first \n\nsecond\r\n\u4e09\n".encode())
    result = invoke("rerank", "query", str(file))
    assert result.stdout == "0.7500  \u4e09\n0.5000  second\n0.2500  first \n"
    assert list(fake_server.calls[0].inputs["DOCUMENTS"][0]) == [b"first ", b"second", "\u4e09".encode()]


def test_rerank_reads_standard_input_and_prints_json(fake_server: type[FakeServer], invoke: Invoke) -> None:
    result = invoke("rerank", "query", "-", "--json", "--top-n", "1", "--instruction", "i", input="a\n\u4e09\n")
    assert json.loads(result.stdout) == [{"index": 1, "score": 0.75, "document": "\u4e09"}]
    assert "\u4e09" in result.stdout
    assert fake_server.calls[0].inputs["INSTRUCTION"].item() == b"i"


def test_a_file_that_is_no_text_is_one_line(fake_server: type[FakeServer], invoke: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "documents.bin"
    file.write_bytes(b"\xff\xfe\n")
    assert failure(invoke("rerank", "query", str(file))) == f"{file} is not UTF-8 text"


# Serving. Nothing is started: every case ends before that.


@pytest.fixture
def serve(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """`genserve serve` on free ports, with a tritonserver that must not be reached."""
    monkeypatch.setattr(server_module, "find_triton", lambda: Triton(tmp_path / "no-tritonserver", source="test"))
    ports = [str(port) for port in free_ports()]

    def serve(*arguments: str) -> Result:
        http, grpc, metrics = ports
        return invoke("serve", "--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics, *arguments)

    return serve


def free_ports() -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def flux_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "flux"
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer_2"):
        (path / part).mkdir(parents=True)
        (path / part / "config.json").write_text("{}")
        (path / part / "model.safetensors").touch()
    (path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (path / "tokenizer_2" / "tokenizer_config.json").write_text("{}")
    monkeypatch.setenv("FLUX_MODEL_PATH", str(path))
    return path


def test_a_missing_repository(serve: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "none"
    assert failure(serve("--repository", str(path))) == f"no model repository at {path} (give --repository)"


def test_a_missing_checkpoint(serve: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUX_MODEL_PATH", "/no/such")
    message = failure(serve("--repository", str(SHIPPED)))
    assert message == "flux: no checkpoint folder at /no/such (set FLUX_MODEL_PATH)"


def test_an_unknown_model(serve: Invoke) -> None:
    message = failure(serve("--repository", str(SHIPPED), "--model", "sdxl"))
    assert message == f"no model sdxl in {SHIPPED}, which has flux, rerank, tasks"


def test_bad_gpus_in_the_environment(serve: Invoke, flux_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUX_GPUS", "zero")
    message = failure(serve("--repository", str(SHIPPED), "--model", "flux"))
    assert message == "FLUX_GPUS is 'zero'; allowed: GPU ids as in 0,1"


@pytest.mark.parametrize("flag", ["--http-port", "--grpc-port", "--metrics-port"])
def test_a_taken_port(flag: str, serve: Invoke, taken_port: int) -> None:
    message = failure(serve(flag, str(taken_port)))
    assert message == f"port {taken_port} on 127.0.0.1: Address already in use (choose another with {flag})"


def test_a_state_folder_that_cannot_be_written(serve: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GENSERVE_STATE_DIR", str(tmp_path / "file" / "below"))
    message = failure(serve("--repository", str(SHIPPED)))
    assert message.startswith(f"cannot create {tmp_path / 'file' / 'below'}")
    assert message.endswith("(set GENSERVE_STATE_DIR to a folder you can write)")


def test_a_failed_start_leaves_its_reason_and_no_repository(serve: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUX_MODEL_PATH", "/no/such")
    message = failure(serve("--repository", str(SHIPPED)))
    (folder,) = ServerState.of(1).folder.parent.iterdir()
    record = json.loads((folder / "server.json").read_text())
    assert (record["ready"], record["error"]) == (False, message)
    assert [path.name for path in folder.iterdir()] == ["server.json"]


@pytest.fixture
def running(taken_port: int) -> ServerState:
    """A server that is said to run: this very process, which holds the port."""
    state = ServerState.of(taken_port)
    state.create()
    state.write(ServeOptions(http_port=taken_port), ready=True)
    return state


def test_a_second_server_on_the_port_is_refused(serve: Invoke, running: ServerState) -> None:
    record = running.read()
    port = str(running.http_port)
    message = failure(serve("--http-port", port))
    assert message.startswith(f"a server runs on HTTP port {port} already (process ")
    assert message.endswith(f"genserve stop --http-port {port} ends it")
    assert running.read() == record


def test_a_second_detached_server_does_not_forget_the_first(running: ServerState) -> None:
    running.log.write_text("the first one's log")
    record = running.read()
    with pytest.raises(ServeError, match="a server runs on HTTP port"):
        start_detached(["--http-port", str(running.http_port)], ServeOptions(http_port=running.http_port))
    assert running.read() == record
    assert running.log.read_text() == "the first one's log"


def test_a_detached_server_that_cannot_start_says_why(taken_port: int) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "genserve", "serve", "--detach", "--http-port", str(taken_port)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"genserve: port {taken_port} on 127.0.0.1: Address already in use")


# Stopping.


def test_stopping_what_does_not_run(invoke: Invoke) -> None:
    message = failure(invoke("stop", "--http-port", "9"))
    assert message == "no server that `genserve serve` started runs on HTTP port 9"


@pytest.mark.parametrize(
    "record",
    ['{"pid": 1, "started": 0.0, "ready": true}', '{"pid": 4194305, "started": 0.0}', "{}", "[]", "not JSON", ""],
    ids=["other-process", "no-process", "empty-object", "list", "no-json", "empty"],
)
def test_a_stale_record_is_no_server(record: str, invoke: Invoke) -> None:
    state = ServerState.of(9)
    state.create()
    (state.folder / "server.json").write_text(record)
    assert "no server" in failure(invoke("stop", "--http-port", "9"))
    assert not (state.folder / "server.json").exists()


def test_stop_ends_the_server_and_says_so(invoke: Invoke) -> None:
    code = (
        "import time; from genserve.serve.options import ServeOptions; from genserve.serve.state import ServerState;"
        " state = ServerState.of(9); state.create(); state.write(ServeOptions(http_port=9), ready=True);"
        " print('written', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        result = invoke("stop", "--http-port", "9")
        assert (result.exit_code, result.stdout) == (0, "stopped the server on HTTP port 9\n")
        assert not psutil.pid_exists(process.pid)
    assert "no server" in failure(invoke("stop", "--http-port", "9"))
