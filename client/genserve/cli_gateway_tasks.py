"""Options of the gateway for durable tasks, files and webhooks."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import click

from genserve.cli_options import Verb

TASKS_OFF = "off"
RESULTS_ENV = "GENSERVE_RESULTS"
SECRET_ENV = "GENSERVE_WEBHOOK_SECRET"  # noqa: S105  # the variable's name
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def _seconds(_: click.Context, __: click.Parameter, given: str) -> float:
    """Return the seconds of a length of time."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", given)
    if not found or not float(found[1]):
        raise click.BadParameter(f"{given!r} is not a length of time; allowed: as 90s, 30m, 24h or 7d")
    return float(found[1]) * UNITS[found[2] or "s"]


NAMES = (
    "public_url",
    "tasks",
    "max_tasks",
    "keep_tasks_s",
    "results",
    "keep_files_s",
    "webhook_secret",
    "webhook_allow",
)
_OPTIONS = (
    click.option(
        "--public-url",
        default="",
        metavar="URL",
        envvar="GENSERVE_GATEWAY_PUBLIC_URL",
        show_envvar=True,
        help="The gateway's address for its callers, for the URLs of images.",
    ),
    click.option(
        "--tasks",
        metavar="URL",
        envvar="GENSERVE_GATEWAY_TASKS",
        show_envvar=True,
        help="Database of durable tasks: sqlite:///PATH, postgresql://USER:PASSWORD@HOST/NAME, or"
        f" {TASKS_OFF}.  [default: a file in the state folder]",
    ),
    click.option(
        "--max-tasks",
        type=click.IntRange(min=1),
        default=10_000,
        show_default=True,
        envvar="GENSERVE_GATEWAY_MAX_TASKS",
        show_envvar=True,
        help="Most tasks that are not finished.",
    ),
    click.option(
        "--keep-tasks",
        "keep_tasks_s",
        callback=_seconds,
        metavar="TIME",
        default="24h",
        show_default=True,
        envvar="GENSERVE_GATEWAY_KEEP_TASKS",
        show_envvar=True,
        help="Time that a finished task is kept, with its image.",
    ),
    click.option(
        "--results",
        type=click.Path(path_type=Path, file_okay=False),
        envvar=RESULTS_ENV,
        show_envvar=True,
        help="Folder of images.  [default: next to the database]",
    ),
    click.option(
        "--keep-files",
        "keep_files_s",
        callback=_seconds,
        metavar="TIME",
        default="1h",
        show_default=True,
        envvar="GENSERVE_GATEWAY_KEEP_FILES",
        show_envvar=True,
        help="Time that an image is kept which was answered as a URL.",
    ),
    click.option(
        "--webhook-secret",
        default="",
        metavar="BASE64",
        envvar=SECRET_ENV,
        show_envvar=True,
        help="Secret that signs webhooks; several with spaces in between all sign.  [default: no webhooks]",
    ),
    click.option(
        "--webhook-allow",
        multiple=True,
        metavar="NETWORK|HOST",
        envvar="GENSERVE_GATEWAY_WEBHOOK_ALLOW",
        show_envvar=True,
        help="Network or host that webhooks may go to although it is not public. Repeatable.",
    ),
)


def task_options(verb: Verb) -> Verb:
    """Add the options of durable tasks to a verb, which receives them as `durable`, the values of the settings."""

    @functools.wraps(verb)
    def with_tasks(**options: Any) -> Any:
        return verb(durable={name: options.pop(name) for name in NAMES}, **options)

    for option in reversed(_OPTIONS):
        with_tasks = option(with_tasks)
    return with_tasks


def chosen_database(given: str | None, port: int) -> str | None:
    """Return the address of the database of tasks for a gateway on a port, None for a gateway without tasks."""
    from genserve.gateway.database import default_url

    return None if given == TASKS_OFF else given or default_url(port)
