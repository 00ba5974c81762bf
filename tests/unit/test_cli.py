"""Output and failure messages of every verb."""

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

from genserve import cli_calls, cli_options
from genserve.access import TLS
from genserve.cli import main
from genserve.errors import GenServeError, InvalidInput, NotAllowed, QueueFull, ServerUnavailable
from genserve.protocol import Call, Outputs
from genserve.serve import server as server_module
from genserve.serve.options import ServeError, ServeOptions
from genserve.serve.server import start_detached
from genserve.serve.state import ServerState
from genserve.serve.triton import Triton

SHIPPED = Path(__file__).parents[2] / "model_repository"
NOBODY = ("localhost:1", "http://localhost:1")
"""Addresses of closed ports."""

Invoke = Callable[..., Result]


@pytest.fixture(autouse=True)
def untouched_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Isolate the verbs from this machine's state, and restore signals and logging."""
    monkeypatch.setenv("GENSERVE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("GENSERVE_CACHE_DIR", str(tmp_path / "cache"))
    servers = ("GENSERVE_URL", "GENSERVE_HEADERS", "GENSERVE_CA", "GENSERVE_CERT", "GENSERVE_KEY")
    for name in (*servers, "FLUX_GPUS", "RERANK_GPUS", "WORKERS", "FLUX_WORKERS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
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
    """Return the failure line on stderr, log lines aside."""
    assert result.exit_code == 1, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("time=")]
    assert line.startswith("genserve: ")
    return line.removeprefix("genserve: ")


def test_contract_verbs_exist() -> None:
    verbs = {"serve", "stop", "generate", "rerank", "map", "task", "cancel", "status", "models", "doctor"}
    assert verbs <= set(main.commands)


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "a cat", "-o", "x.png", "--priority", "urgent"],
        ["models", "--header", "no colon"],
        ["serve", "--gpus", "all"],
        ["serve", "--gpus", "-1"],
        ["serve", "--instances", "flux"],
        ["serve", "--instances", "flux=0"],
        ["serve", "--instances", "flux=many"],
    ],
    ids=" ".join,
)
def test_invalid_option_is_rejected_before_any_effect(arguments: list[str], invoke: Invoke, tmp_path: Path) -> None:
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
    [
        ["generate", "a cat", "-o", "x.png"],
        ["rerank", "q", "-"],
        ["task", "id", "--preview", "x.jpg"],
        ["cancel", "id"],
        ["models"],
        ["models", "--json"],
    ],
    ids=" ".join,
)
def test_unreachable_server_prints_one_line(arguments: list[str], url: str, invoke: Invoke, tmp_path: Path) -> None:
    result = invoke(*arguments, "--url", url, input="document\n")
    message = failure(result)
    assert message.startswith("ServerUnavailable: ")
    assert url in message
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", NOBODY, ids=["grpc", "http"])
def test_status_and_doctor_fail_for_an_unreachable_server(url: str, invoke: Invoke) -> None:
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


def test_address_comes_from_the_environment(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_client_rejection_prints_one_line(arguments: list[str], message: str, invoke: Invoke) -> None:
    assert failure(invoke(*arguments, input="\n \n")).startswith(message)


RUNNING = {
    "task_id": "mine",
    "state": "running",
    "step": 3,
    "steps": 28,
    "model": "flux",
    "instance": "flux_0_0",
    "error": None,
    "arrived": 1.5,
    "changed": 2.5,
}
FAILED = {**RUNNING, "state": "failed", "error": "ServerError: x"}
UNKNOWN = {"task_id": "mine", "state": "unknown", "step": 0, "steps": 0, "instance": None}


class FakeServer:
    """Server that answers or fails every request."""

    url = "fake"

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.timeouts: list[float] = []
        self.error: GenServeError | None = None
        self.failures: list[GenServeError] = []
        self.task: dict[str, Any] = RUNNING
        self.preview = b"jpeg"
        self.info: dict[str, Any] = {}

    def infer(self, call: Call, timeout_s: float) -> Outputs:
        self.calls.append(call)
        self.timeouts.append(timeout_s)
        if self.failures:
            raise self.failures.pop()
        if self.error:
            raise self.error
        if call.model == "tasks":
            listed = call.inputs["ACTION"].item() == b"list"
            return {
                "TASK": np.array([json.dumps([self.task] if listed else self.task).encode()], dtype=np.object_),
                "PREVIEW": np.array([self.preview], dtype=np.object_),
            }
        if call.model == "rerank":
            count = call.inputs["DOCUMENTS"].shape[1]
            return {
                "SCORES": np.linspace(0.25, 0.75, count, dtype=np.float32)[None],
                "INFO": np.array([[b"{}"]], dtype=np.object_),
            }
        buffer = io.BytesIO()
        Image.new("RGB", (64, 96)).save(buffer, "PNG")
        info = {"width": 64, "height": 96, "steps": 4, "elapsed_time": 1.234, "device": "cpu", **self.info}
        return {
            "IMAGE": np.array([[buffer.getvalue()]], dtype=np.object_),
            "SEED": np.array([[7]], dtype=np.int64),
            "INFO": np.array([[json.dumps(info).encode()]], dtype=np.object_),
        }

    def ready(self) -> bool:
        return True

    def metadata(self) -> dict[str, Any]:
        if self.error:
            raise self.error
        return {"version": "2.55.0"}

    def models(self) -> list[dict[str, Any]]:
        return [{"name": "flux", "version": "1", "state": "READY"}]

    def statistics(self) -> list[dict[str, Any]]:
        return []

    def close(self) -> None:
        pass


@pytest.fixture
def fake_server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def ask(fake_server: FakeServer) -> Invoke:
    """Invoke a verb with the fake server."""

    def ask(*arguments: str, **options: Any) -> Result:
        return CliRunner().invoke(main, list(arguments), prog_name="genserve", obj=fake_server, **options)

    return ask


def test_generate_writes_the_file_and_prints_a_summary(ask: Invoke, fake_server: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    result = ask("generate", "a cat", "-o", str(file), "--seed", "7", "--steps", "4", "--priority", "high")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{file}: 64 x 96, 4 steps, seed 7, 1.23 s on cpu\n"
    assert Image.open(file).size == (64, 96)
    (call,) = fake_server.calls
    sent = {name: array.item() for name, array in call.inputs.items() if name != "TASK_ID"}
    assert sent == {"PROMPT": b"a cat", "SEED": 7, "STEPS": 4, "FORMAT": b"png"}
    assert call.priority == 1


def test_adapters_and_cache_are_sent(ask: Invoke, fake_server: FakeServer, tmp_path: Path) -> None:
    adapters = ["--lora", "neon", "--lora", "other=0.6", "--lora", "a=b=-1e-1"]
    result = ask("generate", "a cat", "-o", str(tmp_path / "x.png"), *adapters, "--cache", "0.1")
    assert (result.exit_code, result.stderr) == (0, "")
    sent = fake_server.calls[0].inputs
    assert json.loads(sent["LORA"].item()) == [
        {"name": "neon", "weight": 1.0},
        {"name": "other", "weight": 0.6},
        {"name": "a=b", "weight": -0.1},
    ]
    assert sent["CACHE"].item() == pytest.approx(0.1)


@pytest.mark.parametrize("text", ["neon=", "neon=high", "neon=0,6"])
def test_weight_that_is_no_number_is_rejected(text: str, ask: Invoke, fake_server: FakeServer, tmp_path: Path) -> None:
    result = ask("generate", "a cat", "-o", str(tmp_path / "x.png"), "--lora", text)
    assert result.exit_code == 2
    assert f"Invalid value for '--lora': {text!r} has the weight" in result.stderr
    assert fake_server.calls == []


@pytest.mark.parametrize("text", ["neon=nan", "=1", ""])
def test_unusable_adapter_is_invalid_input(text: str, ask: Invoke, fake_server: FakeServer, tmp_path: Path) -> None:
    message = failure(ask("generate", "a cat", "-o", str(tmp_path / "x.png"), "--lora", text))
    assert message.startswith("InvalidInput: LORA has the ")
    assert fake_server.calls == []


def test_summary_has_the_skipped_steps(ask: Invoke, fake_server: FakeServer, tmp_path: Path) -> None:
    fake_server.info = {"skipped_steps": 3}
    result = ask("generate", "a cat", "-o", str(tmp_path / "x.png"))
    assert "64 x 96, 4 steps (3 skipped), seed 7" in result.stdout


def test_generate_prints_json(ask: Invoke, fake_server: FakeServer, tmp_path: Path) -> None:
    result = ask("generate", "a cat", "-o", str(tmp_path / "x.png"), "--json")
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
def test_file_suffix_selects_the_format(
    name: str, option: str | None, sent: bytes, ask: Invoke, fake_server: FakeServer, tmp_path: Path
) -> None:
    ask("generate", "a cat", "-o", str(tmp_path / name), *(["--format", option] if option else []))
    assert fake_server.calls[0].inputs["FORMAT"].item() == sent


@pytest.mark.parametrize(("name", "kind"), [("x.gif", "GIF"), ("x.webp", "WEBP"), ("x", "PNG")])
def test_file_is_converted_to_what_its_suffix_says(name: str, kind: str, ask: Invoke, tmp_path: Path) -> None:
    assert ask("generate", "a cat", "-o", str(tmp_path / name)).exit_code == 0
    assert Image.open(tmp_path / name).format == kind


def test_given_format_is_written_whatever_the_suffix(ask: Invoke, tmp_path: Path) -> None:
    for name in ("x.webp", "x.xyz"):
        assert ask("generate", "a cat", "-o", str(tmp_path / name), "--format", "png").exit_code == 0
        assert Image.open(tmp_path / name).format == "PNG"


def test_unknown_suffix_fails_before_any_request(ask: Invoke, fake_server: FakeServer, tmp_path: Path) -> None:
    message = failure(ask("generate", "a cat", "-o", str(tmp_path / "x.xyz")))
    assert message.startswith("InvalidInput: the suffix is '.xyz'; allowed: ")
    assert fake_server.calls == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", [["generate", "x", "-o"], ["task", "mine", "--preview"]], ids=["generate", "task"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no-such-folder/x.png", "No such file or directory"),
        ("file/x.png", "Not a directory"),
        ("closed/x.png", "Permission denied"),
        ("closed.png", "Permission denied"),
        (f"{'x' * 300}.png", "File name too long"),
    ],
    ids=["no-folder", "file-as-folder", "closed-folder", "closed-file", "name"],
)
def test_unwritable_file_fails_before_any_request(
    name: str,
    reason: str,
    verb: list[str],
    ask: Invoke,
    fake_server: FakeServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed.png").write_bytes(b"old")
    # Root may write everywhere.
    monkeypatch.setattr(cli_options.os, "access", lambda path, mode: "closed" not in Path(path).name)
    assert failure(ask(*verb, str(tmp_path / name))) == f"cannot write {tmp_path / name}: {reason}"
    assert fake_server.calls == []
    assert (tmp_path / "closed.png").read_bytes() == b"old"
    assert not (tmp_path / "closed" / "x.png").exists()


def test_failed_write_prints_one_line(ask: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_calls, "check_output", lambda path: None)
    file = tmp_path / "gone" / "x.png"
    assert failure(ask("generate", "x", "-o", str(file))) == f"cannot write {file}: No such file or directory"


def test_file_without_folder_is_written_to_the_working_folder(ask: Invoke, tmp_path: Path) -> None:
    assert ask("generate", "x", "-o", "x.png").exit_code == 0
    assert ask("generate", "again", "-o", "x.png").exit_code == 0
    assert (tmp_path / "x.png").stat().st_size


@pytest.mark.parametrize(
    "error", [InvalidInput("STEPS is 0;\nallowed: 1 to 100"), QueueFull("full")], ids=lambda error: type(error).__name__
)
def test_server_error_prints_one_line(
    error: GenServeError, ask: Invoke, fake_server: FakeServer, tmp_path: Path
) -> None:
    fake_server.error = error
    message = failure(ask("generate", "x", "-o", str(tmp_path / "x.png")))
    assert message == f"{type(error).__name__}: {' '.join(str(error).split())}"
    assert not (tmp_path / "x.png").exists()


def test_rerank_reads_lines_and_prints_the_best_first(ask: Invoke, fake_server: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "documents.txt"
    file.write_bytes("first \n\nsecond\r\n\u4e09\n".encode())
    result = ask("rerank", "query", str(file))
    assert result.stdout == "0.7500  \u4e09\n0.5000  second\n0.2500  first \n"
    assert list(fake_server.calls[0].inputs["DOCUMENTS"][0]) == [b"first ", b"second", "\u4e09".encode()]


def test_rerank_reads_standard_input_and_prints_json(ask: Invoke, fake_server: FakeServer) -> None:
    result = ask("rerank", "query", "-", "--json", "--top-n", "1", "--instruction", "i", input="a\n\u4e09\n")
    assert json.loads(result.stdout) == [{"index": 1, "score": 0.75, "document": "\u4e09"}]
    assert "\u4e09" in result.stdout
    assert fake_server.calls[0].inputs["INSTRUCTION"].item() == b"i"


def test_binary_file_prints_one_line(ask: Invoke, fake_server: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "documents.bin"
    file.write_bytes(b"\xff\xfe\n")
    assert failure(ask("rerank", "query", str(file))) == f"{file} is not UTF-8 text"


@pytest.mark.parametrize("verb", [["generate", "x", "-o", "x.png"], ["rerank", "q", "-"]], ids=["generate", "rerank"])
def test_task_id_and_retry_for_apply_to_requests(verb: list[str], ask: Invoke, fake_server: FakeServer) -> None:
    fake_server.failures = [ServerUnavailable("down")]
    result = ask(*verb, "--task-id", "mine", "--retry-for", "20", "--timeout", "30", input="a\n")
    assert (result.exit_code, result.stderr) == (0, "")
    assert [call.request_id for call in fake_server.calls] == ["mine", "mine"]
    assert 20 < fake_server.timeouts[1] <= fake_server.timeouts[0] <= 30


# Tasks.


@pytest.mark.parametrize("verb", ["task", "cancel"])
@pytest.mark.parametrize(
    ("task", "line"),
    [
        (RUNNING, "task mine  running  step 3 of 28  flux_0_0\n"),
        (FAILED, "task mine  failed  step 3 of 28  flux_0_0  ServerError: x\n"),
        (UNKNOWN, "task mine  unknown\n"),
    ],
    ids=["running", "failed", "unknown"],
)
def test_task_and_cancel_print_one_line(
    task: dict[str, Any], line: str, verb: str, ask: Invoke, fake_server: FakeServer
) -> None:
    fake_server.task = task
    result = ask(verb, "mine")
    assert (result.exit_code, result.stdout, result.stderr) == (0, line, "")
    actions = [call.inputs["ACTION"].item() for call in fake_server.calls]
    assert actions == ([b"status"] if verb == "task" else [b"status", b"cancel"])
    assert {call.inputs["TASK_ID"].item() for call in fake_server.calls} == {b"mine"}


@pytest.mark.parametrize("verb", ["task", "cancel"])
def test_task_and_cancel_print_json(verb: str, ask: Invoke) -> None:
    assert json.loads(ask(verb, "mine", "--json").stdout) == RUNNING


def test_preview_is_written_if_present(ask: Invoke, fake_server: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "so-far.jpg"
    assert ask("task", "mine", "--preview", str(file)).exit_code == 0
    assert file.read_bytes() == b"jpeg"
    file.unlink()
    fake_server.preview = b""
    assert ask("task", "mine", "--preview", str(file)).exit_code == 0
    assert not file.exists()


def test_status_lists_tasks_in_flight(ask: Invoke) -> None:
    assert "  task mine  running  step 3 of 28  flux_0_0\n" in ask("status").stdout
    (shown,) = json.loads(ask("status", "--json").stdout)
    assert (shown["ready"], shown["error"], shown["tasks"]) == (True, "", [RUNNING])


def test_status_reports_a_missing_key(ask: Invoke, fake_server: FakeServer) -> None:
    fake_server.error = NotAllowed("fake: HTTP status 401 Unauthorized")
    assert failure(ask("status")) == "NotAllowed: fake: HTTP status 401 Unauthorized"


# Access options. No server is called: the arguments of the client are compared.


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the arguments of every client that a verb created."""
    found: list[dict[str, Any]] = []

    def make(url: tuple[str, ...], **options: Any) -> Any:
        found.append({"urls": url, **options})
        raise InvalidInput("seen enough")

    monkeypatch.setattr(cli_options, "Client", make)
    return found


@pytest.mark.parametrize(
    ("environment", "options", "headers"),
    [
        ("", [], {}),
        ("Authorization: Bearer a", [], {"Authorization": "Bearer a"}),
        ("Authorization: Bearer a\n\nX-Tenant:b:c\n", [], {"Authorization": "Bearer a", "X-Tenant": "b:c"}),
        ("", ["Authorization:Bearer a", "X-Empty:"], {"Authorization": "Bearer a", "X-Empty": ""}),
        (
            "Authorization: Bearer a\nX-Tenant: b",
            ["authorization: Bearer c"],
            {"authorization": "Bearer c", "X-Tenant": "b"},
        ),
    ],
    ids=["none", "environment", "lines", "options", "both"],
)
def test_headers_merge_environment_and_options(
    environment: str,
    options: list[str],
    headers: dict[str, str],
    invoke: Invoke,
    made: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GENSERVE_HEADERS", environment)
    invoke("models", *(word for option in options for word in ("--header", option)))
    assert made[0]["headers"] == headers


def test_certificates_come_from_options_or_environment(
    invoke: Invoke, made: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    invoke("models", "--url", "https://a", "--ca", "ca.pem", "--cert", "cert.pem", "--key", "key.pem")
    monkeypatch.setenv("GENSERVE_CA", "other.pem")
    invoke("models")
    invoke("models", "--ca", "ca.pem")
    assert [each["urls"] for each in made] == [("https://a",), ("localhost:8001",), ("localhost:8001",)]
    ca, cert, key = Path("ca.pem"), Path("cert.pem"), Path("key.pem")
    assert [each["tls"] for each in made] == [TLS(ca, cert, key), TLS(ca=Path("other.pem")), TLS(ca=ca)]


@pytest.mark.parametrize("source", ["option", "environment"])
def test_malformed_header_is_rejected_and_not_repeated(
    source: str, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source == "environment":
        monkeypatch.setenv("GENSERVE_HEADERS", "secret")
    result = invoke("models", *(["--header", "secret"] if source == "option" else []))
    assert result.exit_code == 2
    assert "NAME: VALUE" in result.stderr
    assert "secret" not in result.stderr


def test_invalid_header_name_prints_one_line_without_the_value(invoke: Invoke) -> None:
    message = failure(invoke("models", "--header", "X Y: secret"))
    assert message.startswith("InvalidInput: headers contain an invalid name")
    assert "secret" not in message


# Serving. No server is started: every case fails earlier.


@pytest.fixture
def serve(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Invoke `genserve serve` on free ports, without a tritonserver."""
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


def test_missing_repository_is_reported(serve: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "none"
    assert failure(serve("--repository", str(path))) == f"no model repository at {path} (give --repository)"


def test_missing_checkpoint_is_reported(serve: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUX_MODEL_PATH", "/no/such")
    message = failure(serve("--repository", str(SHIPPED)))
    assert message == "flux: no checkpoint folder at /no/such (set FLUX_MODEL_PATH)"


def test_unknown_model_is_reported(serve: Invoke) -> None:
    message = failure(serve("--repository", str(SHIPPED), "--model", "sdxl"))
    assert message == f"no model sdxl in {SHIPPED}, which has flux, rerank, tasks"


def test_invalid_gpus_in_the_environment_are_reported(
    serve: Invoke, flux_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLUX_GPUS", "zero")
    message = failure(serve("--repository", str(SHIPPED), "--model", "flux"))
    assert message == "FLUX_GPUS is 'zero'; allowed: GPU ids as in 0,1"


@pytest.mark.parametrize("flag", ["--http-port", "--grpc-port", "--metrics-port"])
def test_port_in_use_is_reported(flag: str, serve: Invoke, taken_port: int) -> None:
    message = failure(serve(flag, str(taken_port)))
    assert message == f"port {taken_port} on 127.0.0.1: Address already in use (choose another with {flag})"


def test_unwritable_state_folder_is_reported(serve: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GENSERVE_STATE_DIR", str(tmp_path / "file" / "below"))
    message = failure(serve("--repository", str(SHIPPED)))
    assert message.startswith(f"cannot create {tmp_path / 'file' / 'below'}")
    assert message.endswith("(set GENSERVE_STATE_DIR to a folder you can write)")


def test_failed_start_records_its_reason_and_removes_the_repository(
    serve: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLUX_MODEL_PATH", "/no/such")
    message = failure(serve("--repository", str(SHIPPED)))
    (folder,) = ServerState.of(1).folder.parent.iterdir()
    record = json.loads((folder / "server.json").read_text())
    assert (record["ready"], record["error"]) == (False, message)
    assert [path.name for path in folder.iterdir()] == ["server.json"]


@pytest.fixture
def running(taken_port: int) -> ServerState:
    """Record this process, which holds the port, as a running server."""
    state = ServerState.of(taken_port)
    state.create()
    state.write(ServeOptions(http_port=taken_port), ready=True)
    return state


def test_second_server_on_a_port_is_rejected(serve: Invoke, running: ServerState) -> None:
    record = running.read()
    port = str(running.http_port)
    message = failure(serve("--http-port", port))
    assert message.startswith(f"a server runs on HTTP port {port} already (process ")
    assert message.endswith(f"genserve stop --http-port {port} ends it")
    assert running.read() == record


def test_second_detached_server_keeps_the_first_record(running: ServerState) -> None:
    running.log.write_text("the first one's log")
    record = running.read()
    with pytest.raises(ServeError, match="a server runs on HTTP port"):
        start_detached(["--http-port", str(running.http_port)], ServeOptions(http_port=running.http_port))
    assert running.read() == record
    assert running.log.read_text() == "the first one's log"


def test_detached_start_reports_its_failure(taken_port: int) -> None:
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


def test_stop_without_a_server_fails(invoke: Invoke) -> None:
    message = failure(invoke("stop", "--http-port", "9"))
    assert message == "no server started by `genserve serve` runs on HTTP port 9"


@pytest.mark.parametrize(
    "record",
    ['{"pid": 1, "started": 0.0, "ready": true}', '{"pid": 4194305, "started": 0.0}', "{}", "[]", "not JSON", ""],
    ids=["other-process", "no-process", "empty-object", "list", "no-json", "empty"],
)
def test_stale_record_is_not_a_server(record: str, invoke: Invoke) -> None:
    state = ServerState.of(9)
    state.create()
    (state.folder / "server.json").write_text(record)
    assert "no server" in failure(invoke("stop", "--http-port", "9"))
    assert not (state.folder / "server.json").exists()


def test_stop_ends_the_server_and_reports_it(invoke: Invoke) -> None:
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
