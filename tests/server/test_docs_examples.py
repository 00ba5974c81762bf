"""Examples of the documentation, run against a real server."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from conftest import GENSERVE, ROOT, Server
from gateways import Gateway, running_gateway

from genserve import Client

PAGES = ("docs/api.md", "docs/client.md", "docs/gateway.md", "README.md")


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    """Return the commands that call a server, or write the files for that, without their output."""
    lines = "".join(blocks(page, "console")).replace("\\\n", " ").splitlines()
    calls = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [
        call for call in calls if re.search(r"^echo |\bgenserve (?!serve|stop|doctor$|gateway(?! key))|\bcurl\b", call)
    ]


def local(text: str, server: Server, gateway: Gateway) -> str:
    """Replace the documented addresses and the path of the command."""
    ports = dict(zip(("8000", "8001", "8002", "12411"), map(str, [*server.ports, gateway.port]), strict=True))
    text = re.sub(r"localhost:(800[012]|12411)", lambda match: f"localhost:{ports[match[1]]}", text)
    return text.replace(".venv/bin/genserve", "genserve")


@pytest.fixture(scope="module")
def running(running_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), running_server.grpc) as gateway:
        yield gateway


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the certificates that the examples name, in which curl reports error statuses."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    caller = authority.issue_cert("caller")
    caller.private_key_pem.write_to_path(tmp_path / "client.key")
    caller.cert_chain_pems[0].write_to_path(tmp_path / "client.pem")
    (tmp_path / ".curlrc").write_text("fail-with-body\n")
    monkeypatch.setenv("CURL_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_python_examples_run(page: str, server: Server, running: Gateway, folder: Path) -> None:
    examples = blocks(page, "python")
    assert examples
    for example in examples:
        exec(compile(local(example, server, running), page, "exec"), {"__name__": "example"})


@pytest.mark.parametrize("page", PAGES[1:])
def test_console_examples_run(page: str, server: Server, running: Gateway, folder: Path) -> None:
    examples = commands(page)
    assert len(examples) > 4
    path = os.pathsep.join([str(Path(GENSERVE).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "GENSERVE_URL": server.grpc}
    for example in examples:
        command = ["bash", "-ec", f"set -o pipefail; {local(example, server, running)}"]
        result = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert result.returncode == 0, (example, result.stdout, result.stderr)


def fields(heading: str) -> set[str]:
    """Return the first column of the table below a heading of docs/api.md."""
    section = (ROOT / "docs" / "api.md").read_text().partition(f"### {heading}\n")[2].partition("\n#")[0]
    names = re.findall(r"^\| ([a-z_, ]+) \|", section, flags=re.MULTILINE)
    return {name for cell in names for name in cell.split(", ")} - {"field"}


def test_info_and_task_fields_are_those_of_the_api_reference(server: Server) -> None:
    with Client(server.grpc) as client:
        image = client.generate("a red circle", steps=1, lora="neon", task_id="documented")
        assert image.info.keys() == fields("INFO of flux")
        assert client.rerank("q", ["d"]).info.keys() == fields("INFO of rerank")
        assert client.task("documented").as_dict().keys() == fields("Fields of TASK")
