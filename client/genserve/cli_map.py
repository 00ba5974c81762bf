"""Verb for files of tasks."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, BinaryIO

import click

from genserve.aio import DEFAULT_TIMEOUT_S, MAP_RETRY_S
from genserve.bulk import Progress
from genserve.cli_help import examples
from genserve.cli_options import Servers, fail, json_option, server_options
from genserve.map_files import FileProblem, MapTask, Results, parse_tasks
from genserve.protocol import PRIORITIES
from genserve.types import GeneratedImage, Priority

STANDARD_INPUT = Path("-")
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells report it."""


@click.command(
    "map",
    epilog=examples(
        "genserve map prompts.jsonl -o results.jsonl --images images",
        "genserve map tasks.jsonl -o results.jsonl --retry-failed --url gpu-1:8001 --url gpu-2:8001",
        """echo '{"id": "star", "prompt": "a blue star", "steps": 4}' | genserve map - -o results.jsonl""",
    ),
)
@click.argument("tasks", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="File of the results. One that exists is continued.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the images.  [default: next to OUTPUT; results-images for results.jsonl]",
)
@click.option("--concurrency", type=click.IntRange(min=1), help="Requests in flight.  [default: as many as help]")
@click.option("--serial", is_flag=True, help="One request after another, for comparison.")
@click.option("--retry-failed", is_flag=True, help="Do tasks again that failed in an earlier run.")
@click.option("--priority", type=click.Choice(list(PRIORITIES)), default="normal", show_default=True)
@click.option("--timeout", type=float, default=DEFAULT_TIMEOUT_S, show_default=True, help="Seconds for each task.")
@click.option(
    "--retry-for",
    type=click.FloatRange(min=0),
    default=MAP_RETRY_S,
    show_default=True,
    help="Seconds to retry a task while no server is reachable.",
)
@server_options
@json_option
def map_verb(
    tasks: Path,
    output: Path,
    images: Path | None,
    concurrency: int | None,
    serial: bool,
    retry_failed: bool,
    priority: Priority,
    timeout: float,
    retry_for: float,
    servers: Servers,
    as_json: bool,
) -> None:
    """Do all tasks of a file: TASKS has one JSON object per line, - for standard input.

    A task has the arguments of generate (with a prompt) or rerank (with a query), and an id; without one, its line's
    number is its id. Each task gets one line in OUTPUT: its id, ok, and the image's file, seed and info, or the
    ranking, or the error.

    Tasks that are in OUTPUT already are not done again, so the same command continues after an interruption. The exit
    status is 1 if tasks failed, and 130 after Ctrl-C.
    """
    if serial and concurrency:
        raise click.UsageError("--serial and --concurrency exclude each other.")
    run = _Run(as_json=as_json)
    try:
        with (
            _opened(tasks) as lines,
            servers.client(timeout=timeout, retry_for=retry_for) as client,
            # Last: unusable options leave no file behind.
            closing(Results(output, images or _image_folder(output), retry_failed=retry_failed)) as results,
        ):
            run.start(tasks, results)
            answers = client.map(
                run.arguments(parse_tasks(lines)),
                concurrency=1 if serial else concurrency,
                ordered=False,
                retry_for=retry_for,
                priority=priority,
            )
            with closing(answers):  # type: ignore[type-var]  # a generator
                for answer in answers:
                    run.finish(answer)
    except KeyboardInterrupt:
        run.report("interrupted; the same command continues")
        sys.exit(INTERRUPTED)
    except FileProblem as problem:
        run.close()
        fail(str(problem))
    run.report("done")
    if failures := run.failures():
        fail(f"{failures}; see {output}")


class _Run:
    """One run: tasks in flight, and what became of the others."""

    def __init__(self, *, as_json: bool) -> None:
        self._counts = Counter(done=0, failed=0, skipped=0, failed_before=0, repeated=0)
        self._as_json = as_json
        self._running: dict[int, MapTask] = {}
        self._started = time.monotonic()
        self._bar: Progress | None = None

    def start(self, tasks: Path, results: Results) -> None:
        """Start to write results."""
        self._results = results
        shown = sys.stderr.isatty() and not self._as_json
        self._bar = Progress(_line_count(tasks) if shown else None, shown=shown)

    def arguments(self, tasks: Iterable[MapTask]) -> Iterator[dict[str, Any]]:
        """Yield the arguments of each task that has no result yet."""
        index = 0
        seen: set[str] = set()
        for task in tasks:
            if task.id in seen:
                self._count("repeated")
            elif task.id in self._results.ids:
                self._count("skipped", *(["failed_before"] if task.id in self._results.failed else []))
            elif task.problem:
                self._results.add_error(task, task.problem)
                self._count("done", "failed")
            else:
                self._running[index] = task
                index += 1
                yield task.arguments
            seen.add(task.id)

    def finish(self, answer: Any) -> None:
        """Write the result of a task."""
        task = self._running.pop(answer.index)
        if answer.error:
            self._results.add_error(task, answer.error)
        elif isinstance(answer.result, GeneratedImage):
            self._results.add_image(task, answer.result)
        else:
            self._results.add_ranking(task, answer.result)
        self._count("done", *(["failed"] if answer.error else []))

    def report(self, state: str) -> None:
        """Print the counts."""
        self.close()
        seconds = time.monotonic() - self._started
        if self._as_json:
            click.echo(json.dumps({**self._counts, "seconds": round(seconds, 3)}))
            return
        done, failed, skipped, repeated = (self._counts[name] for name in ("done", "failed", "skipped", "repeated"))
        rate = f", {done / seconds:.2f} per second" if done else ""
        text = f"{state}: {done} tasks in {seconds:.1f} s{rate}, {failed} failed, {skipped} had a result already"
        click.echo(f"{text}, {repeated} lines repeat an id" if repeated else text)

    def failures(self) -> str:
        """Return a description of the failed tasks, empty if there are none."""
        done, failed, before = (self._counts[name] for name in ("done", "failed", "failed_before"))
        now = [f"{failed} of {done} tasks failed"] if failed else []
        return "; ".join([*now, *([f"{before} failed before, and --retry-failed does them again"] if before else [])])

    def close(self) -> None:
        """End the progress bar."""
        if self._bar:
            self._bar.close()

    def _count(self, *names: str) -> None:
        self._counts.update(names)
        if self._bar:
            self._bar.advance(failed="failed" in names)


def _image_folder(output: Path) -> Path:
    return output.with_name(f"{output.stem}-images")


def _opened(path: Path) -> BinaryIO:
    if path == STANDARD_INPUT:
        return sys.stdin.buffer
    try:
        return path.open("rb")
    except OSError as error:
        raise FileProblem(f"cannot read {path}: {error.strerror}") from None


def _line_count(path: Path) -> int | None:
    """Return the number of lines that are not blank, None if they can be read only once."""
    if path == STANDARD_INPUT or not path.is_file():
        return None
    with suppress(OSError), path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())
    return None


VERBS = (map_verb,)
