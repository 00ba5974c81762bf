"""NVIDIA's aiperf against the gateway: images, plain and as a stream, and rankings in three dialects.

aiperf is installed into an environment of its own, because it needs other packages than GenServe. It draws prompts
with a tokenizer, usually one from a model hub; the demo's reranker has one in its folder. With --check it fails if
aiperf counts an error, or fewer answers than it asked for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich import box

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import COUNT, RERANK_CHECKPOINT, ROOT, SETTINGS, fail, judge, new_table, show
from common.gateway import own_gateway
from genserve.serve.options import ServeError
from genserve.serve.own_server import own_server

PACKAGE = "aiperf==0.13.*"
LIMIT_S = 300
"""Seconds for one of aiperf's runs."""
RANKINGS = {"rankings-passages-mean": 5, "rankings-passages-prompt-token-mean": 32}
IMAGES = {"synthetic-input-tokens-mean": 8, "extra-inputs": '{"size": "128x128", "num_inference_steps": 4}'}


@dataclass(frozen=True)
class Run:
    """One of aiperf's runs.

    Attributes:
        endpoint: aiperf's type of endpoint.
        model: The model's name in the requests.
        options: Further options, by name.
        streaming: Ask for a stream of events.
    """

    endpoint: str
    model: str
    options: Mapping[str, Any]
    streaming: bool = False

    def command(self, aiperf: Path, url: str, folder: Path, *, requests: int, concurrency: int) -> list[str]:
        """Return the command that sends the requests and writes its report to `folder`."""
        options = {
            "model": self.model,
            "endpoint-type": self.endpoint,
            "url": url,
            "tokenizer": RERANK_CHECKPOINT,
            "request-count": requests,
            "concurrency": concurrency,
            "output-artifact-dir": folder,
            "ui": "none",
            **self.options,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [str(aiperf), "profile", *words, *(["--streaming"] if self.streaming else [])]


RUNS = {
    "images": Run("image_generation", "flux", IMAGES),
    "images, streaming": Run("image_generation", "flux", IMAGES, streaming=True),
    "Cohere": Run("cohere_rankings", "rerank", RANKINGS),
    "text-embeddings-inference": Run("hf_tei_rankings", "rerank", RANKINGS),
    "NIM": Run("nim_rankings", "rerank", RANKINGS),
}


def installed(folder: Path) -> Path:
    """Return the program, installed into an environment in `folder` unless it is there."""
    program = folder / "bin" / "aiperf"
    if not program.exists():
        click.echo(f"installing {PACKAGE} into {folder}", err=True)
        venv.create(folder, with_pip=True)
        pip = [
            str(folder / "bin" / "python"),
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--quiet",
            "install",
            PACKAGE,
        ]
        if subprocess.run(pip, check=False).returncode:
            fail(f"{PACKAGE} could not be installed")
    return program


def report_of(command: list[str], folder: Path) -> dict[str, Any]:
    """Run aiperf and return its report.

    Raises:
        ServeError: aiperf failed.
    """
    # In huggingface_hub's offline mode, aiperf takes a folder's name for the name of a repository.
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder, env=environment, timeout=LIMIT_S
    )
    file = folder / "profile_export_aiperf.json"
    if ended.returncode or not file.exists():
        raise ServeError(f"aiperf exited with {ended.returncode}: {(ended.stderr or ended.stdout).strip()[-500:]}")
    report: dict[str, Any] = json.loads(file.read_text())
    return report


def broken_promises(reports: Mapping[str, dict[str, Any]], requests: int) -> list[str]:
    """Return the runs with errors or missing answers."""
    broken = []
    for title, report in reports.items():
        answered = int(report.get("request_count", {}).get("avg", 0))
        if report["error_summary"] or answered != requests:
            broken.append(f"{title}: {answered} of {requests} answers, errors: {report['error_summary']}")
    return broken


@click.command(context_settings=SETTINGS)
@click.option(
    "--environment",
    type=click.Path(file_okay=False, path_type=Path),
    default=ROOT / ".venv-aiperf",
    help="Folder of aiperf's environment.  [default: .venv-aiperf]",
)
@click.option("--requests", type=COUNT, default=40, show_default=True, help="Requests of each run.")
@click.option("--concurrency", type=COUNT, default=4, show_default=True, help="Requests in flight.")
@click.option("--check", is_flag=True, help="Fail if aiperf counts an error.")
def main(environment: Path, requests: int, concurrency: int, check: bool) -> None:
    """Let aiperf measure the gateway with each type of endpoint."""
    aiperf = installed(environment.resolve())
    reports = {}
    try:
        with tempfile.TemporaryDirectory(prefix="genserve-aiperf-") as folder:
            logs = Path(folder)
            with (
                own_server(("flux", "rerank", "tasks"), log=logs / "server.log") as addresses,
                own_gateway(addresses["grpc"], log=logs / "gateway.log") as gateway,
            ):
                for number, (title, run) in enumerate(RUNS.items()):
                    click.echo(title, err=True)
                    results = logs / str(number)
                    results.mkdir()
                    command = run.command(
                        aiperf, f"http://{gateway}", results, requests=requests, concurrency=concurrency
                    )
                    reports[title] = report_of(command, results)
    except (ServeError, subprocess.TimeoutExpired) as error:
        fail(error)
    drawn = new_table("Requests", "Endpoint type", "Answers", "Mean, ms", "p99, ms", "1/s")
    drawn.box = box.MARKDOWN
    for title, report in reports.items():
        latency = report.get("request_latency", {})
        drawn.add_row(
            title,
            RUNS[title].endpoint,
            f"{report.get('request_count', {}).get('avg', 0):.0f}",
            f"{latency.get('avg', 0):.1f}",
            f"{latency.get('p99', 0):.1f}",
            f"{report.get('request_throughput', {}).get('avg', 0):.1f}",
        )
    show(drawn)
    judge(broken_promises(reports, requests), check=check)


if __name__ == "__main__":
    main()
