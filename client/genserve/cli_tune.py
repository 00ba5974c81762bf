"""Verb that finds faster settings."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from genserve.cli_help import examples
from genserve.cli_options import Servers, fail, json_option, server_options

if TYPE_CHECKING:
    from genserve.tune.load import Load
    from genserve.tune.run import Goal, Result
    from genserve.tune.start import Start
    from genserve.types import InstanceLoad, Setting

MODELS = ("flux", "rerank")
IN_FLIGHT = {"flux": 8, "rerank": 4}
"""Default number of requests in flight, by model."""
CLOSE_S = 15.0
"""Seconds of the budget in which the last servers stop and the files are written."""
LEAST_S = 60.0
"""Least budget: the start of a server, and one measurement."""
SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
INTERRUPTED = "interrupted"
INTERRUPTED_STATUS = 130
"""Exit status after Ctrl-C and SIGTERM."""


def _seconds(_: click.Context, __: click.Parameter, text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    seconds = float(found[1]) * SECONDS[found[2]] if found else 0.0
    if seconds < LEAST_S:
        raise click.BadParameter(f"{text!r}; allowed: a time as 90s, 20m or 1.5h, at least {LEAST_S:g} s")
    return seconds


def _pixels(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    pairs = [re.fullmatch(r"(\d+)x(\d+)", text) for text in texts]
    for text, found in zip(texts, pairs, strict=True):
        if not found:
            raise click.BadParameter(f"{text!r}; allowed: WIDTHxHEIGHT as in 1024x768")
    return tuple((int(found[1]), int(found[2])) for found in pairs if found)


@click.command(
    epilog=examples(
        "genserve tune",
        "genserve tune --model flux --budget 1h --size 1024x1024 --steps 28 --in-flight 16 -o tuned",
        "genserve tune --model rerank --for latency --percentile 99 --rate 5 --documents 50",
        "genserve tune --tasks tasks.jsonl --lossy",
        "genserve tune --url localhost:8001 --json",
    )
)
@click.option("--model", "models_", type=click.Choice(MODELS), multiple=True, help="Tune only this model. Repeatable.")
@click.option("--budget", callback=_seconds, default="20m", show_default=True, help="Time for everything.")
@click.option(
    "--for",
    "objective",
    type=click.Choice(["throughput", "latency"]),
    default="throughput",
    show_default=True,
    help="More images or documents per second, or a shorter percentile of the latency.",
)
@click.option("--percentile", type=click.FloatRange(50, 100), default=95, show_default=True, help="With --for latency.")
@click.option("--in-flight", type=click.IntRange(1, 1000), help="Requests in flight.  [default: 8 images, 4 rankings]")
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    help="With --for latency: requests per second at random times, instead of --in-flight.",
)
@click.option(
    "--size",
    "sizes",
    callback=_pixels,
    multiple=True,
    metavar="WxH",
    help="Size of images; several take turns.  [default: the checkpoint's]",
)
@click.option("--steps", type=click.IntRange(1, 100), help="Steps of the images.  [default: the checkpoint's]")
@click.option(
    "--documents", type=click.IntRange(1, 1000), default=32, show_default=True, help="Documents of a ranking."
)
@click.option("--length", type=click.IntRange(1, 10_000), default=100, show_default=True, help="Words of a document.")
@click.option(
    "--tasks",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Load from a file of tasks, as for `genserve map`, instead of drawn requests.",
)
@click.option("--lossy", is_flag=True, help="Also try dtypes and padding, which change images or scores a little.")
@click.option(
    "--margin",
    type=click.FloatRange(0, 100),
    default=2.0,
    show_default=True,
    help="Percent below which a gain is not worth a change.",
)
@click.option("--repository", type=click.Path(path_type=Path), help="Model repository.  [default: ./model_repository]")
@click.option("--gpus", help="GPU ids, as in 0,1.  [default: FLUX_GPUS and RERANK_GPUS, else all]")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Folder for genserve-tuned.env and genserve-tuned.sh.  [default: the working folder]",
)
@click.option("--force", is_flag=True, help="Replace these files.")
@server_options
@json_option
def tune(
    models_: tuple[str, ...],
    budget: float,
    repository: Path | None,
    gpus: str | None,
    output: Path,
    force: bool,
    lossy: bool,
    margin: float,
    objective: Any,
    percentile: float,
    servers: Servers,
    as_json: bool,
    **load_options: Any,
) -> None:
    """Find faster settings by measuring servers of its own, and write them to files.

    Starts from the configuration in force: the environment, or with --url that of a running server. Each change is
    compared with the best settings so far in interleaved blocks of the same requests, and adopted only if its gain
    exceeds noise and the margin. At the end, fresh servers have to confirm the result. The budget is never exceeded;
    Ctrl-C writes what has been found so far.
    """
    if load_options["rate"] and objective != "latency":
        raise click.UsageError("--rate fixes the throughput; it goes with --for latency.")
    if len(servers.urls) > 1:
        raise click.UsageError("--url names one server, whose settings are the start.")
    from genserve.serve.options import ServeError, default_repository
    from genserve.tune.files import FILES, check_folder
    from genserve.tune.run import Goal

    began = time.monotonic()
    goal = Goal(objective, percentile, margin / 100, lossy)
    options = ["--gpus", gpus] if gpus else []
    if repository:
        options += ["--repository", str(repository.absolute())]
    try:
        check_folder(output, force=force)
        running = _Running.ask(servers) if servers.are_given else None
        loads = _loads(models_ or (running.models if running else MODELS), explicit=bool(models_), **load_options)
        start = _start([load.model for load in loads], (repository or default_repository()).absolute(), running)
        results, ended = _tune(loads, start, goal, options, end=began + budget - CLOSE_S, began=began, quiet=as_json)
        if results:
            _write(output, results, start, goal, options)
    except ServeError as error:
        fail(str(error))
    files = [str(output / name) for name in FILES] if results else []
    if as_json:
        from genserve.tune.report import as_json as json_of

        seconds = round(time.monotonic() - began, 1)
        found = {"models": [json_of(each, goal) for each in results], "files": files, "seconds": seconds}
        click.echo(json.dumps(found))
    elif results:
        click.echo(f"wrote {' and '.join(files)} after {time.monotonic() - began:.0f} s")
    if ended == INTERRUPTED:
        click.echo(f"genserve: {INTERRUPTED}" + ("" if results else ": nothing was measured yet"), err=True)
        sys.exit(INTERRUPTED_STATUS)
    if ended:
        fail(ended)


def _loads(models: tuple[str, ...], *, explicit: bool, tasks: Path | None, **options: Any) -> list[Load]:
    """Return the load of each model. A model without a task in the file is left out, unless it was asked for."""
    from genserve.map_files import FileProblem
    from genserve.tune.load import file_load, image_load, rerank_load

    found = []
    for model in dict.fromkeys(models):
        shared = {"in_flight": options["in_flight"] or IN_FLIGHT[model], "rate": options["rate"]}
        if tasks is None:
            drawn = (
                image_load(sizes=options["sizes"], steps=options["steps"], **shared)
                if model == "flux"
                else rerank_load(documents=options["documents"], length=options["length"], **shared)
            )
            found.append(drawn)
            continue
        try:
            load = file_load(tasks, model, **shared)
        except FileProblem as problem:
            fail(str(problem))
        if load:
            found.append(load)
        elif explicit:
            fail(f"{tasks} has no task for {model}")
    if not found:
        fail(f"{tasks} has no tasks" if tasks else "the server has no model that can be tuned")
    return found


@dataclass(frozen=True)
class _Running:
    """Running server that gives the start."""

    settings: list[Setting]
    instances: list[InstanceLoad]

    @classmethod
    def ask(cls, servers: Servers) -> _Running:
        """Ask the server."""
        with servers.client() as client:
            running = cls(client.config(), client.gpu_load())
        click.echo("the server at --url keeps running; do not load it meanwhile", err=True)
        return running

    @property
    def models(self) -> tuple[str, ...]:
        """Its models that can be tuned."""
        return tuple(model for model in MODELS if any(each.model == model for each in self.instances))


def _start(models: list[str], repository: Path, running: _Running | None) -> Start:
    from genserve.tune.start import from_environment, from_server

    if running is None:
        return from_environment(models, repository)
    return from_server(models, repository, running.settings, running.instances)


def _tune(
    loads: list[Load], start: Start, goal: Goal, options: list[str], *, end: float, began: float, quiet: bool
) -> tuple[list[Result], str]:
    """Tune one model after the other. Return the results, and the reason why there are fewer than loads, else empty."""
    from genserve.serve.options import ServeError
    from genserve.tune.interrupts import Interrupts
    from genserve.tune.report import print_table
    from genserve.tune.run import tune_model
    from genserve.tune.search import TuneError

    def say(line: str) -> None:
        click.echo(f"{time.monotonic() - began:5.0f} s  {line}", err=True)

    results: list[Result] = []
    problems: list[str] = []
    with Interrupts() as interrupts:
        try:
            for index, load in enumerate(loads):
                now = time.monotonic()
                deadline = now + (end - now) / (len(loads) - index)
                try:
                    result = tune_model(
                        load, start, goal, options=options, deadline=deadline, interrupts=interrupts, say=say
                    )
                except (ServeError, TuneError) as error:
                    problems.append(str(error))
                    continue
                results.append(result)
                if not quiet:
                    print_table(result, goal)
                if result.outcome.ended == INTERRUPTED:
                    return results, INTERRUPTED
        except KeyboardInterrupt:
            return results, INTERRUPTED
    return results, "; ".join(problems)


def _write(output: Path, results: list[Result], start: Start, goal: Goal, options: list[str]) -> None:
    from genserve.tune.files import environment_text, script_text, write_files
    from genserve.tune.report import summary, tuned_variables

    tuned: dict[str, str] = {}
    remarks: list[str] = []
    for result in results:
        tuned |= tuned_variables(result, goal)
        remarks += summary(result, goal)
    kept = {name: value for name, value in start.environment.items() if name not in tuned}
    devices = list(dict.fromkeys(device for result in results for device in result.devices))
    text = environment_text(tuned, kept, remarks, devices=devices, now=datetime.now().astimezone())
    only = [result.load.model for result in results]
    words = [word for model in only for word in ("--model", model)] if len(only) < len(MODELS) else []
    write_files(output, text, script_text([*words, *options]))


VERBS = (tune,)
