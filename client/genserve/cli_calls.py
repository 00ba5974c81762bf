"""Verbs that call servers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from genserve.cli_help import examples
from genserve.cli_inspect import task_line
from genserve.cli_options import (
    Servers,
    check_output,
    fail,
    json_option,
    request_options,
    server_options,
    write_output,
)
from genserve.cli_terminal import image_drawer, step_bar
from genserve.image_files import checked_format, file_bytes
from genserve.types import GeneratedImage, ImageFormat, Priority, TaskStatus

SUFFIXES: dict[str, ImageFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
output_type = click.Path(dir_okay=False, readable=False, path_type=Path)


def _adapters(context: click.Context, option: click.Parameter, given: tuple[str, ...]) -> list[tuple[str, float]]:
    """Return names with their weights. The last = divides the two."""
    return [_adapter(each) for each in given]


def _adapter(text: str) -> tuple[str, float]:
    name, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return name, float(weight)
    except ValueError:
        raise click.BadParameter(f"{text!r} has the weight {weight!r}; allowed: a number, as in neon=0.6") from None


@click.command(
    epilog=examples(
        'genserve generate "a red circle on a blue background" -o circle.png --steps 4 --seed 7',
        'genserve generate "a blue star" -o star.webp --negative-prompt "a circle" --priority high',
        'genserve generate "a green square" --show',
        'genserve generate "a red circle" -o neon.png --lora neon',
        'genserve generate "a red circle" -o both.png --lora neon=0.6 --lora blueprint=0.6 --cache 0.06',
    )
)
@click.argument("prompt")
@click.option("-o", "--output", type=output_type, help="File to write. Required without --show.")
@click.option("--show", is_flag=True, help="Draw the image in the terminal; needs 'genserve[terminal]'.")
@click.option("--negative-prompt", help="Content to keep out of the image.")
@click.option("--true-cfg-scale", type=float, help="Scale of the negative prompt, 1 to 20.")
@click.option("--height", type=int, help="Pixels, a multiple of 16.")
@click.option("--width", type=int, help="Pixels, a multiple of 16.")
@click.option("--steps", type=int, help="Denoising steps, 1 to 100.")
@click.option("--guidance", type=float, help="Guidance scale, 0 to 20.")
@click.option("--seed", type=int, help="0 to 2^63 - 1; the same seed gives the same image.  [default: random]")
@click.option(
    "--lora",
    multiple=True,
    metavar="NAME[=WEIGHT]",
    callback=_adapters,
    help="LoRA adapter that the server has, as in neon or neon=0.6. Repeatable.",
)
@click.option("--cache", type=float, help="Skip steps that would hardly change the image: 0 to 1.  [default: 0, none]")
@click.option("--format", "image_format", help="png, jpeg or webp.  [default: from the file name]")
@click.option("-q", "--quiet", is_flag=True, help="Print no progress and no summary.")
@request_options
@server_options
@json_option
def generate(
    prompt: str,
    output: Path | None,
    show: bool,
    image_format: ImageFormat | None,
    quiet: bool,
    retry_for: float,
    servers: Servers,
    as_json: bool,
    **settings: Any,
) -> None:
    """Generate an image from PROMPT.

    The suffix of the file selects its format: .png, .jpg, .webp, or any other that Pillow writes.
    """
    if output is None and not show:
        raise click.UsageError("Missing option '-o' / '--output', or '--show'.")
    if show and as_json:
        raise click.UsageError("'--show' and '--json' exclude each other.")
    suffix = output.suffix.lower() if output and not image_format else ""
    if output:
        checked_format(suffix)
        check_output(output)
    draw = image_drawer() if show else None
    with servers.client(retry_for=retry_for) as client, step_bar(hidden=quiet or as_json) as on_progress:
        image_format = image_format or SUFFIXES.get(suffix, "png")
        image = client.generate(prompt, format=image_format, on_progress=on_progress, **settings)
    if output:
        write_output(output, file_bytes(image.data, suffix))
    if draw:
        draw(image.image)
    if as_json:
        click.echo(json.dumps({"file": str(output), **image.info}))
    elif not quiet:
        click.echo(_summary(output, image))


def _summary(output: Path | None, image: GeneratedImage) -> str:
    info = image.info
    skipped = f" ({info['skipped_steps']} skipped)" if info.get("skipped_steps") else ""
    text = (
        f"{info['width']} x {info['height']}, {info['steps']} steps{skipped}, seed {image.seed},"
        f" {info['elapsed_time']:.2f} s on {info['device']}"
    )
    return f"{output}: {text}" if output else text


@click.command(
    epilog=examples(
        'genserve rerank "capital of France" documents.txt --top-n 3',
        "printf 'Paris is its capital.\\nBerlin is a city.\\n' | genserve rerank \"capital of France\" - --json",
    )
)
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


@click.command(epilog=examples("genserve task poster-7", "genserve task poster-7 --preview so-far.jpg --json"))
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


@click.command(epilog=examples("genserve cancel poster-7"))
@click.argument("task_id")
@server_options
@json_option
def cancel(task_id: str, servers: Servers, as_json: bool) -> None:
    """Cancel task TASK_ID at its next step, or as soon as it leaves Triton's queue."""
    with servers.client() as client:
        found = client.cancel(task_id)
    _print_task(found, as_json=as_json)


def _print_task(task: TaskStatus, *, as_json: bool) -> None:
    click.echo(json.dumps(task.as_dict()) if as_json else task_line(task))


VERBS = (generate, rerank, task, cancel)
