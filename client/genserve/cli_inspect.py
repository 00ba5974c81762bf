"""Verbs that look at servers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import click

from genserve.cli_help import examples
from genserve.cli_options import Servers, fail, json_option, server_options
from genserve.errors import NotAllowed
from genserve.types import InstanceLoad, ServerStatus, Setting, TaskStatus

GIB = 2**30


@click.command(
    epilog=examples(
        "genserve status",
        "genserve status --url localhost:8001 --url http://localhost:9000 --json",
    )
)
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
        click.echo(f"  {task_line(each)}")


def task_line(task: TaskStatus) -> str:
    """Return one line with a task's state and progress."""
    parts = [f"task {task.task_id}", task.state]
    if task.steps:
        parts.append(f"step {task.step} of {task.steps}")
    if task.instance:
        parts.append(task.instance)
    if task.error:
        parts.append(task.error)
    return "  ".join(parts)


@click.command(epilog=examples("genserve models", "genserve models --json"))
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


@click.command(epilog=examples("genserve load", "genserve load --json"))
@server_options
@json_option
def load(servers: Servers, as_json: bool) -> None:
    """Show each instance's device, requests and memory.

    Running and waiting requests are those at the instance, without Triton's queue.
    """
    with servers.client() as client:
        found = client.gpu_load()
    if as_json:
        click.echo(json.dumps([asdict(instance) for instance in found]))
    else:
        _print_by_server([(each.url, _load_cells(each)) for each in found])


def _load_cells(instance: InstanceLoad) -> tuple[str, ...]:
    used, free, total = instance.memory_used, instance.memory_free, instance.memory_total
    return (
        instance.instance,
        instance.device,
        "ready" if instance.ready else "not ready",
        f"{instance.running} running",
        f"{instance.waiting} waiting",
        "" if used is None else f"{used / GIB:.1f} GiB used",
        "" if free is None or total is None else f"{free / GIB:.1f} of {total / GIB:.1f} GiB free",
    )


@click.command(epilog=examples("genserve config", "genserve config --json"))
@server_options
@json_option
def config(servers: Servers, as_json: bool) -> None:
    """Show each model's settings in force, with their sources."""
    with servers.client() as client:
        found = client.config()
    if as_json:
        click.echo(json.dumps([asdict(setting) for setting in found]))
    else:
        _print_by_server([(each.url, _setting_cells(each)) for each in found])


def _setting_cells(setting: Setting) -> tuple[str, ...]:
    value = setting.value if isinstance(setting.value, str) else json.dumps(setting.value)
    return setting.model, setting.name, value, setting.source


def _print_by_server(rows: Sequence[tuple[str, tuple[str, ...]]]) -> None:
    """Print rows in columns, below the address of their server if there are several."""
    urls = list(dict.fromkeys(url for url, _ in rows))
    widths = [max(map(len, column)) for column in zip(*(cells for _, cells in rows), strict=True)]
    for url in urls:
        if len(urls) > 1:
            click.echo(url)
        for cells in (cells for place, cells in rows if place == url):
            line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
            click.echo(f"  {line}" if len(urls) > 1 else line)


VERBS = (status, models, load, config)
