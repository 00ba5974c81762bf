"""Verbs that call servers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from genserve.cli_options import (
    Servers,
    check_output,
    fail,
    json_option,
    request_options,
    server_options,
    write_output,
)
from genserve.errors import NotAllowed
from genserve.types import ImageFormat, Priority, ServerStatus, TaskStatus

SUFFIXES: dict[str, ImageFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
output_type = click.Path(dir_okay=False, readable=False, path_type=Path)


@click.command()
@click.argument("prompt")
@click.option("-o", "--output", type=output_type, required=True, help="File to write.")
@click.option("--negative-prompt", help="Content to keep out of the image.")
@click.option("--true-cfg-scale", type=float, help="Scale of the negative prompt, 1 to 20.")
@click.option("--height", type=int, help="Pixels, a multiple of 16.")
@click.option("--width", type=int, help="Pixels, a multiple of 16.")
@click.option("--steps", type=int, help="Denoising steps, 1 to 100.")
@click.option("--guidance", type=float, help="Guidance scale, 0 to 20.")
@click.option("--seed", type=int, help="0 to 2^63 - 1; the same seed gives the same image.  [default: random]")
@click.option("--format", "image_format", help="png, jpeg or webp.  [default: from the file name]")
@request_options
@server_options
@json_option
def generate(
    prompt: str,
    output: Path,
    image_format: ImageFormat | None,
    retry_for: float,
    servers: Servers,
    as_json: bool,
    **settings: Any,
) -> None:
    """Generate an image from PROMPT."""
    check_output(output)
    image_format = image_format or SUFFIXES.get(output.suffix.lower(), "png")
    with servers.client(retry_for=retry_for) as client:
        image = client.generate(prompt, format=image_format, **settings)
    write_output(output, image.data)
    if as_json:
        click.echo(json.dumps({"file": str(output), **image.info}))
    else:
        info = image.info
        click.echo(
            f"{output}: {info['width']} x {info['height']}, {info['steps']} steps, seed {image.seed},"
            f" {info['elapsed_time']:.2f} s on {info['device']}"
        )


@click.command()
@click.argument("query")
@click.argument("file", type=click.File(encoding="utf-8"))
@click.option("--top-n", type=click.IntRange(min=1), help="Number of documents to print.  [default: all]")
@click.option("--instruction", help="Task instruction, for rerankers that support one.")
@click.option(
    "--windows",
    type=click.IntRange(1, 64),
    default=1,
    help="Overlapping windows per long document; the best score counts.  [default: 1, truncate]",
)
@request_options
@server_options
@json_option
def rerank(
    query: str,
    file: Any,
    top_n: int | None,
    instruction: str | None,
    windows: int,
    priority: Priority,
    timeout: float,
    retry_for: float,
    task_id: str | None,
    servers: Servers,
    as_json: bool,
) -> None:
    """Rank the documents in FILE by relevance to QUERY: one per line, - for standard input."""
    try:
        documents = [line.rstrip("\r\n") for line in file if line.strip()]
    except UnicodeDecodeError:
        fail(f"{file.name} is not UTF-8 text")
    with servers.client(retry_for=retry_for) as client:
        ranked = client.rerank(
            query,
            documents,
            top_n=top_n,
            instruction=instruction,
            windows=windows,
            priority=priority,
            timeout=timeout,
            task_id=task_id,
        )
    if as_json:
        click.echo(json.dumps([asdict(document) for document in ranked], ensure_ascii=False))
    else:
        for document in ranked:
            click.echo(f"{document.score:.4f}  {document.document}")


@click.command()
@click.argument("task_id")
@click.option("--preview", type=output_type, help="Write the preview, a JPEG, to this file if there is one.")
@server_options
@json_option
def task(task_id: str, preview: Path | None, servers: Servers, as_json: bool) -> None:
    """Show the state of task TASK_ID.

    A task that waits in Triton's queue is unknown, and so is one that ended long ago.
    """
    if preview:
        check_output(preview)
    with servers.client() as client:
        found = client.task(task_id)
    if preview and found.preview:
        write_output(preview, found.preview)
    _print_task(found, as_json=as_json)


@click.command()
@click.argument("task_id")
@server_options
@json_option
def cancel(task_id: str, servers: Servers, as_json: bool) -> None:
    """Cancel task TASK_ID at its next step, or as soon as it leaves Triton's queue."""
    with servers.client() as client:
        found = client.cancel(task_id)
    _print_task(found, as_json=as_json)


def _print_task(task: TaskStatus, *, as_json: bool) -> None:
    click.echo(json.dumps(task.as_dict()) if as_json else _task_line(task))


def _task_line(task: TaskStatus) -> str:
    parts = [f"task {task.task_id}", task.state]
    if task.steps:
        parts.append(f"step {task.step} of {task.steps}")
    if task.instance:
        parts.append(task.instance)
    if task.error:
        parts.append(task.error)
    return "  ".join(parts)


@click.command()
@server_options
@json_option
def status(servers: Servers, as_json: bool) -> None:
    """Show each server's state, models and tasks in flight. Fail if a server is not ready."""
    with servers.client() as client:
        found = client.status()
    if as_json:
        servers_json = [{**asdict(server), "tasks": [task.as_dict() for task in server.tasks]} for server in found]
        click.echo(json.dumps(servers_json))
    else:
        for server in found:
            _print_status(server)
    bad = next((server for server in found if not server.ready), None)
    if bad and bad.live:
        fail(f"{bad.url} is not ready")
    if bad:
        refused = bad.error.startswith(f"{NotAllowed.__name__}: ")
        fail(bad.error if refused else f"{bad.url} is not reachable")


def _print_status(server: ServerStatus) -> None:
    state = "ready" if server.ready else "not ready" if server.live else "not reachable"
    click.echo(f"{server.url}  {state}" + (f"  Triton {server.version}" if server.version else ""))
    for model in server.models:
        click.echo(
            f"  {model.name:<8} {model.state:<12} {model.succeeded} answered, {model.failed} failed,"
            f" {model.queue_s:.3f} s mean queue"
        )
    for each in server.tasks:
        click.echo(f"  {_task_line(each)}")


@click.command()
@server_options
@json_option
def models(servers: Servers, as_json: bool) -> None:
    """List the models and their states."""
    with servers.client() as client:
        found = client.models()
    if as_json:
        click.echo(json.dumps([asdict(model) for model in found]))
    else:
        for model in found:
            click.echo(f"{model.name:<8} version {model.version or '-'}  {model.state}  {model.reason}".rstrip())


VERBS = (generate, rerank, task, cancel, status, models)
