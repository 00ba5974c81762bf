"""The command line: every verb prints one clear line on stderr and exits with 1 when it fails."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from genserve.client import DEFAULT_TIMEOUT_S, DEFAULT_URL, Client
from genserve.errors import GenServeError
from genserve.protocol import PRIORITIES
from genserve.types import ServerStatus

URL_ENV = "GENSERVE_URL"

url_option = click.option(
    "--url",
    "urls",
    multiple=True,
    help=f"Server address: HOST:PORT for gRPC, http://HOST:PORT for HTTP. Repeat it for several servers."
    f"  [env: {URL_ENV}; default: {DEFAULT_URL}]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
timeout_option = click.option("--timeout", type=float, default=DEFAULT_TIMEOUT_S, show_default=True, help="Seconds.")
priority_option = click.option("--priority", type=click.Choice(list(PRIORITIES)), default="normal", show_default=True)
http_port_option = click.option("--http-port", type=click.IntRange(1, 65535), default=8000, show_default=True)


class Group(click.Group):
    """Turns the errors that are meant for the user into one line and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except GenServeError as error:
            _fail(f"{type(error).__name__}: {error}")
        except ModuleNotFoundError as error:
            _fail(f"{error.name} is not installed: pip install 'genserve[serve]' brings what {ctx.info_name} needs")


def _fail(message: str) -> None:
    click.echo(f"genserve: {' '.join(message.split())}", err=True)
    sys.exit(1)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="genserve")
def main() -> None:
    """FLUX and rerankers on Triton: serve them, and call them."""


def _client(urls: tuple[str, ...], timeout: float = DEFAULT_TIMEOUT_S) -> Client:
    given = urls or tuple(filter(None, os.environ.get(URL_ENV, "").split(","))) or (DEFAULT_URL,)
    return Client(given, timeout=timeout)


@main.command()
@click.argument("prompt")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File to write.")
@click.option("--negative-prompt", help="What the image should not show.")
@click.option("--true-cfg-scale", type=float, help="Scale of the negative prompt, 1 to 20.")
@click.option("--height", type=int, help="Pixels, a multiple of 16.")
@click.option("--width", type=int, help="Pixels, a multiple of 16.")
@click.option("--steps", type=int, help="Denoising steps, 1 to 100.")
@click.option("--guidance", type=float, help="Guidance scale, 0 to 20.")
@click.option("--seed", type=int, help="The same seed gives the same image.")
@click.option("--format", "image_format", help="png, jpeg or webp  [default: what the file's name says]")
@priority_option
@timeout_option
@url_option
@json_option
def generate(
    prompt: str,
    output: Path,
    image_format: str | None,
    timeout: float,
    urls: tuple[str, ...],
    as_json: bool,
    **settings: Any,
) -> None:
    """Make an image from PROMPT."""
    suffixes = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
    image_format = image_format or suffixes.get(output.suffix.lower(), "png")
    with _client(urls) as client:
        image = client.generate(prompt, format=image_format, timeout=timeout, **settings)
    try:
        image.save(output)
    except OSError as error:
        _fail(f"cannot write {output}: {error.strerror}")
    if as_json:
        click.echo(json.dumps({"file": str(output), **image.info}))
    else:
        info = image.info
        click.echo(
            f"{output}: {info['width']} x {info['height']}, {info['steps']} steps, seed {image.seed},"
            f" {info['elapsed_time']:.2f} s on {info['device']}"
        )


@main.command()
@click.argument("query")
@click.argument("file", type=click.File(encoding="utf-8"))
@click.option("--top-n", type=click.IntRange(min=1), help="How many to print.  [default: all]")
@click.option("--instruction", help="Task instruction, for rerankers that take one.")
@click.option(
    "--windows",
    type=click.IntRange(1, 64),
    default=1,
    help="Parts in which a document that is too long is read; the best one counts.  [default: 1, cut it]",
)
@priority_option
@timeout_option
@url_option
@json_option
def rerank(
    query: str,
    file: Any,
    top_n: int | None,
    instruction: str | None,
    windows: int,
    priority: str,
    timeout: float,
    urls: tuple[str, ...],
    as_json: bool,
) -> None:
    """Rank the documents in FILE, one a line (- for standard input), by relevance to QUERY."""
    try:
        documents = [line.rstrip("\r\n") for line in file if line.strip()]
    except UnicodeDecodeError:
        _fail(f"{file.name} is not UTF-8 text")
    with _client(urls) as client:
        ranked = client.rerank(
            query,
            documents,
            top_n=top_n,
            instruction=instruction,
            windows=windows,
            priority=priority,
            timeout=timeout,
        )
    if as_json:
        click.echo(json.dumps([asdict(document) for document in ranked], ensure_ascii=False))
    else:
        for document in ranked:
            click.echo(f"{document.score:.4f}  {document.document}")


@main.command()
@url_option
@json_option
def status(urls: tuple[str, ...], as_json: bool) -> None:
    """Show each server's state and what it has in flight. Fails when one of them is not ready."""
    with _client(urls) as client:
        servers = client.status()
    if as_json:
        click.echo(json.dumps([asdict(server) for server in servers]))
    else:
        for server in servers:
            _print_status(server)
    if not all(server.ready for server in servers):
        bad = next(server for server in servers if not server.ready)
        _fail(f"{bad.url} is not {'ready' if bad.live else 'reachable'}")


def _print_status(server: ServerStatus) -> None:
    state = "ready" if server.ready else "not ready" if server.live else "not reachable"
    click.echo(f"{server.url}  {state}" + (f"  Triton {server.version}" if server.version else ""))
    for model in server.models:
        click.echo(
            f"  {model.name:<8} {model.state:<12} {model.succeeded} answered, {model.failed} failed,"
            f" {model.queue_s:.3f} s mean queue"
        )
    for task in server.tasks:
        click.echo(f"  task {task['task_id']}  {task['state']}  step {task['step']} of {task['steps']}")


@main.command()
@url_option
@json_option
def models(urls: tuple[str, ...], as_json: bool) -> None:
    """List the models and whether they are ready."""
    with _client(urls) as client:
        found = client.models()
    if as_json:
        click.echo(json.dumps([asdict(model) for model in found]))
    else:
        for model in found:
            click.echo(f"{model.name:<8} version {model.version or '-'}  {model.state}  {model.reason}".rstrip())


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to bind to; 0.0.0.0 for all.")
@http_port_option
@click.option("--grpc-port", type=click.IntRange(1, 65535), default=8001, show_default=True)
@click.option("--metrics-port", type=click.IntRange(1, 65535), default=8002, show_default=True)
@click.option("--repository", type=click.Path(path_type=Path), help="Model repository.  [default: ./model_repository]")
@click.option("--gpus", help="GPU ids, as in 0,1.  [default: all; or FLUX_GPUS and RERANK_GPUS]")
@click.option("--model", "models_", multiple=True, help="Serve this model only. Repeat it for several.")
@click.option("--instances", multiple=True, metavar="MODEL=N", help="Instances of a model on each device.")
@click.option("--detach", is_flag=True, help="Return when the server is ready, and leave it running.")
@click.option("-v", "--verbose", is_flag=True, help="Show Triton's informational log lines too.")
@json_option
def serve(
    repository: Path | None,
    gpus: str | None,
    models_: tuple[str, ...],
    instances: tuple[str, ...],
    detach: bool,
    as_json: bool,
    **addresses: Any,
) -> None:
    """Start Triton with the model repository, and keep it running until Ctrl-C."""
    from genserve.serve.options import ServeError, ServeOptions
    from genserve.serve.server import Server, start_detached

    options = ServeOptions(
        models=models_, gpus=_gpus(gpus), instances=dict(map(_instance_count, instances)), **addresses
    )
    if repository:
        options = replace(options, repository=repository.absolute())
    try:
        if detach:
            state = start_detached([word for word in sys.argv[2:] if word != "--detach"], options)
            _print_addresses({**options.addresses, "log": str(state.log)}, as_json=as_json)
        else:
            Server(options, on_ready=lambda: _print_addresses(options.addresses, as_json=as_json)).run()
    except ServeError as error:
        _fail(str(error))


def _print_addresses(addresses: dict[str, str], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(addresses))
    else:
        for name, address in addresses.items():
            click.echo(f"{name:<8} {address}")


def _gpus(text: str | None) -> tuple[int, ...] | None:
    from genserve.serve.repository import parse_gpus

    try:
        return parse_gpus(text or "")
    except ValueError:
        raise click.BadParameter(f"{text!r}; allowed: GPU ids as in 0,1", param_hint="--gpus") from None


def _instance_count(text: str) -> tuple[str, int]:
    model, _, count = text.partition("=")
    if not count.isdecimal() or not 1 <= int(count) <= 64:
        raise click.BadParameter(f"{text!r}; allowed: MODEL=N, N from 1 to 64", param_hint="--instances")
    return model, int(count)


@main.command()
@http_port_option
@json_option
def stop(http_port: int, as_json: bool) -> None:
    """End the server on that HTTP port, after its requests in flight have finished."""
    from genserve.serve.options import ServeError
    from genserve.serve.state import stop_server

    try:
        if stop_server(http_port):
            stopped = {"stopped": http_port}
            click.echo(json.dumps(stopped) if as_json else f"stopped the server on HTTP port {http_port}")
        else:
            _fail(f"no server that `genserve serve` started runs on HTTP port {http_port}")
    except ServeError as error:
        _fail(str(error))


@main.command()
@http_port_option
@url_option
@json_option
def doctor(http_port: int, urls: tuple[str, ...], as_json: bool) -> None:
    """Check what serving needs on this machine, and say what to do about what is missing.

    With --url, check that those servers are ready instead.
    """
    from genserve.serve.doctor import examine, examine_servers

    if urls:
        with _client(urls) as client:
            findings = examine_servers(client.status())
    else:
        findings = examine(http_port)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings]))
    else:
        for finding in findings:
            click.echo(f"{finding.state:<5} {finding.subject:<12} {finding.detail}")
    failed = [finding for finding in findings if finding.state == "fail"]
    if failed:
        _fail(f"{len(failed)} of {len(findings)} checks failed")
