"""Verbs that start, stop and check servers."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from genserve.cli_gateway import require_gateway
from genserve.cli_help import examples
from genserve.cli_options import Servers, fail, http_port_option, json_option, server_options

LOAD_TIMEOUT_S = 900.0
"""Default time limit of `doctor --load` for a model: a full-size FLUX takes minutes to load from a slow disk."""


@click.command(
    epilog=examples(
        "genserve serve",
        "genserve serve --gpus 0,1 --instances rerank=2 --detach",
        "genserve serve --model flux --http-port 9000 --grpc-port 9001 --metrics-port 9002",
        "genserve serve --gateway-port 12411",
    )
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to bind to; 0.0.0.0 for every interface.")
@http_port_option
@click.option("--grpc-port", type=click.IntRange(1, 65535), default=8001, show_default=True)
@click.option("--metrics-port", type=click.IntRange(1, 65535), default=8002, show_default=True)
@click.option(
    "--gateway-port",
    type=click.IntRange(1, 65535),
    help="Also run a gateway on this port, with the options of `genserve gateway` that the environment sets.",
)
@click.option("--repository", type=click.Path(path_type=Path), help="Model repository.  [default: ./model_repository]")
@click.option("--gpus", help="GPU ids, as in 0,1.  [default: FLUX_GPUS and RERANK_GPUS, else all]")
@click.option("--model", "models_", multiple=True, help="Serve only this model. Repeatable.")
@click.option("--instances", multiple=True, metavar="MODEL=N", help="Instances per device. Repeatable.")
@click.option("--detach", is_flag=True, help="Return when the server is ready and leave it running.")
@click.option("-v", "--verbose", is_flag=True, help="Log Triton's informational lines too.")
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
    """Start Triton with the model repository and keep it running until Ctrl-C."""
    from genserve.serve.options import ServeError, ServeOptions
    from genserve.serve.server import Server, start_detached

    if addresses["gateway_port"]:
        require_gateway()
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
        fail(str(error))


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


@click.command(epilog=examples("genserve stop", "genserve stop --http-port 9000"))
@http_port_option
@json_option
def stop(http_port: int, as_json: bool) -> None:
    """Stop the server on an HTTP port after its requests in flight have finished."""
    from genserve.serve.options import ServeError
    from genserve.serve.state import stop_server

    try:
        if stop_server(http_port):
            stopped = {"stopped": http_port}
            click.echo(json.dumps(stopped) if as_json else f"stopped the server on HTTP port {http_port}")
        else:
            fail(f"no server started by `genserve serve` runs on HTTP port {http_port}")
    except ServeError as error:
        fail(str(error))


@click.command(
    epilog=examples("genserve doctor", "genserve doctor --model flux --load", "genserve doctor --url localhost:8001")
)
@http_port_option
@click.option("--model", metavar="NAME", help="Check only this model.  [default: all models with a checkpoint]")
@click.option("--load", is_flag=True, help="Load each model in a process of its own, and make a small image or score.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=LOAD_TIMEOUT_S,
    show_default=True,
    help="Seconds for each --load.",
)
@server_options
@json_option
def doctor(http_port: int, model: str | None, load: bool, timeout: float, servers: Servers, as_json: bool) -> None:
    """Check this machine and the models' files for the requirements of serving, with advice for each that is missing.

    With --url, check instead that those servers are ready.
    """
    from genserve.serve.doctor import MODELS, examine, examine_servers

    if servers.are_given and (model or load):
        raise click.UsageError("--model and --load check this machine, and do not go with --url")
    if model and model not in MODELS:
        raise click.BadParameter(f"{model!r}; allowed: {', '.join(MODELS)}", param_hint="--model")
    if servers.are_given:
        with servers.client() as client:
            found = iter(examine_servers(client.status()))
    else:
        found = examine(http_port, model=model, trial_s=timeout if load else None)
    findings = []
    for finding in found:
        findings.append(finding)
        if not as_json:
            click.echo(f"{finding.state:<5} {finding.subject:<12} {finding.detail}")
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings]))
    failed = [finding for finding in findings if finding.state == "fail"]
    if failed:
        fail(f"{len(failed)} of {len(findings)} checks failed")


VERBS = (serve, stop, doctor)
