"""Servers of the reranker's comparison: GenServe through Triton, and others with their own HTTP interface."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import urllib3

from common.script import TIMEOUT_S, run_script
from compare.rerank_load import Load, Request, Timing, drive
from genserve import Client
from genserve.serve.options import ServeError
from genserve.serve.own_server import own_server
from genserve.serve.ports import free_ports

START_S = 180


def run_ours(checkpoint: Path, load: Load, log: Path, environment: Mapping[str, str]) -> Timing:
    """Drive GenServe through Triton, over HTTP."""
    environment = {"RERANK_MODEL_PATH": str(checkpoint), **environment}
    with (
        own_server(("rerank",), log=log, environment=environment) as addresses,
        Client(f"http://{addresses['http']}", timeout=TIMEOUT_S) as client,
    ):

        def call(request: Request) -> list[float]:
            ranked = client.rerank(request.query, request.documents)
            return [document.score for document in sorted(ranked, key=lambda document: document.index)]

        return drive(call, load)


def run_infinity(binary: Path, checkpoint: Path, load: Load, log: Path, *, engine: str) -> Timing:
    """Drive an Infinity server.

    Args:
        binary: ``infinity_emb`` in an environment of its own.
        checkpoint: Folder of the model, with an ONNX file for the engine "optimum".
        load: Requests.
        log: File for its output.
        engine: "torch" or "optimum".
    """
    # A relative path: its ONNX loader fails with an absolute one.
    command = [str(binary), "v2", "--model-id", ".", "--engine", engine, "--device", "cpu"]
    command += ["--no-bettertransformer", "--url-prefix", "", "--served-model-name", "reranker"]
    return _run_other(command, load, log, checkpoint)


def run_vllm(python: Path, checkpoint: Path, load: Load, log: Path) -> Timing:
    """Drive a vLLM server, the build for CPUs; `python` is its environment's interpreter."""
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    command += ["--runner", "pooling", "--dtype", "float32", "--enforce-eager", "--served-model-name", "reranker"]
    command += ["--gpu-memory-utilization", "0.5"]  # a share of the machine's memory, which has to be free
    return _run_other(command, load, log, checkpoint)


def export_onnx(binary: Path, checkpoint: Path, folder: Path) -> None:
    """Export the model to ONNX in float32 and int8, with the Python of Infinity's environment."""
    script = Path(__file__).with_name("export_onnx.py")
    run_script(script, str(checkpoint), str(folder), python=binary.parent / "python")


def _run_other(command: Sequence[str], load: Load, log: Path, folder: Path) -> Timing:
    with _serving(command, log, folder) as url, urllib3.PoolManager(maxsize=len(load.requests)) as pool:

        def call(request: Request) -> list[float]:
            body = {"model": "reranker", "query": request.query, "documents": list(request.documents)}
            answer = pool.request("POST", f"{url}/rerank", json=body, timeout=TIMEOUT_S, retries=False)
            if answer.status != 200:
                raise ServeError(f"{command[0]} answered {answer.status}: {answer.data[:200]!r}")
            results = sorted(answer.json()["results"], key=lambda each: each["index"])
            return [each["relevance_score"] for each in results]

        return drive(call, load)


@contextmanager
def _serving(command: Sequence[str], log: Path, folder: Path) -> Iterator[str]:
    """Run a server in `folder` on a free port inside the block; yield its address."""
    (port,) = free_ports(1)
    silent = {"INFINITY_ANONYMOUS_USAGE_STATS": "0", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    with (
        log.open("wb") as written,
        tempfile.TemporaryDirectory(prefix="genserve-hub-") as hub,  # Infinity keeps ONNX files in it by name
        subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env={**os.environ, **silent, "HF_HUB_OFFLINE": "1", "HF_HOME": hub},
            stdout=written,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process, log)
            yield url
        finally:
            process.terminate()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server is healthy.

    Raises:
        ServeError: The server ended, or is not healthy within `START_S`.
    """
    give_up = time.monotonic() + START_S
    while time.monotonic() < give_up and process.poll() is None:
        try:
            if urllib3.request("GET", f"{url}/health", retries=False, timeout=5).status == 200:
                return
        except urllib3.exceptions.HTTPError:
            pass
        time.sleep(1)
    lines = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line]
    raise ServeError(f"{process.args!s} did not start: {lines[-1].strip() if lines else 'see its log'}")
