"""Options that several verbs share, and the checks that come before a server is asked."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click

from genserve.access import TLS
from genserve.client import DEFAULT_TIMEOUT_S, DEFAULT_URL, Client
from genserve.protocol import MAX_TASK_ID_CHARACTERS, PRIORITIES

URL_ENV = "GENSERVE_URL"
HEADERS_ENV = "GENSERVE_HEADERS"

Verb = Callable[..., Any]

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
http_port_option = click.option("--http-port", type=click.IntRange(1, 65535), default=8000, show_default=True)

_REQUEST_OPTIONS = (
    click.option("--priority", type=click.Choice(list(PRIORITIES)), default="normal", show_default=True),
    click.option("--timeout", type=float, default=DEFAULT_TIMEOUT_S, show_default=True, help="Seconds, in all."),
    click.option(
        "--retry-for",
        type=click.FloatRange(min=0),
        default=0.0,
        show_default=True,
        help="Seconds to go on trying while no server can be reached.",
    ),
    click.option(
        "--task-id", help=f"Id for `genserve task` and `cancel`, at most {MAX_TASK_ID_CHARACTERS} characters."
    ),
)
_SERVER_OPTIONS = (
    click.option(
        "--url",
        "urls",
        multiple=True,
        help="Server address: HOST:PORT or grpcs://HOST for gRPC, http://HOST:PORT or https://HOST for HTTP. Repeat it"
        f" for several servers.  [env: {URL_ENV}; default: {DEFAULT_URL}]",
    ),
    click.option(
        "--header",
        "headers",
        multiple=True,
        metavar="'NAME: VALUE'",
        help="Header of every request, as a gateway may want it. Repeat it for several."
        f"  [env: {HEADERS_ENV}, one a line]",
    ),
    click.option("--ca", type=Path, envvar="GENSERVE_CA", show_envvar=True, help="Authorities to trust, a PEM file."),
    click.option("--cert", type=Path, envvar="GENSERVE_CERT", show_envvar=True, help="This client's certificate."),
    click.option("--key", type=Path, envvar="GENSERVE_KEY", show_envvar=True, help="Its key."),
)


@dataclass(frozen=True)
class Servers:
    """The servers that a verb asks, and the way to them."""

    urls: tuple[str, ...]
    headers: dict[str, str]
    tls: TLS

    @property
    def are_given(self) -> bool:
        """True if the command line names servers."""
        return bool(self.urls)

    def client(self, **options: Any) -> Client:
        """Return a client of them; of the context's transport where one is set, as tests do."""
        transport = click.get_current_context().obj
        if transport is not None:
            return Client(transport=transport, **options)
        urls = self.urls or tuple(filter(None, os.environ.get(URL_ENV, "").split(","))) or (DEFAULT_URL,)
        return Client(urls, tls=self.tls, headers=self.headers, **options)


def server_options(verb: Verb) -> Verb:
    """Add the options for servers to a verb, which gets them as `servers`."""

    @functools.wraps(verb)
    def with_servers(
        urls: tuple[str, ...],
        headers: tuple[str, ...],
        ca: Path | None,
        cert: Path | None,
        key: Path | None,
        **options: Any,
    ) -> Any:
        return verb(servers=Servers(urls, _headers(headers), TLS(ca, cert, key)), **options)

    return _with(_SERVER_OPTIONS, with_servers)


def request_options(verb: Verb) -> Verb:
    """Add the options that every request has to a verb: priority, timeout, retry_for and task_id."""
    return _with(_REQUEST_OPTIONS, verb)


def _with(options: Sequence[Callable[[Verb], Verb]], verb: Verb) -> Verb:
    for option in reversed(options):
        verb = option(verb)
    return verb


def _headers(given: tuple[str, ...]) -> dict[str, str]:
    """Return the headers of the environment and the command line; the latter wins. No message repeats a value."""
    headers: dict[str, str] = {}
    sources = [(HEADERS_ENV, os.environ.get(HEADERS_ENV, "").splitlines()), ("--header", given)]
    for source, lines in sources:
        for line in filter(str.strip, lines):
            name, colon, value = line.partition(":")
            if not colon:
                raise click.BadParameter("a header has no colon; allowed: 'NAME: VALUE'", param_hint=source)
            headers = {known: old for known, old in headers.items() if known.lower() != name.strip().lower()}
            headers[name.strip()] = value.strip()
    return headers


def check_output(path: Path) -> None:
    """End the program with one line if a file cannot be written; create and change nothing."""
    place, wanted = path, os.W_OK
    try:
        if not _exists(path):
            place, wanted = path.parent, os.W_OK | os.X_OK
            place.stat()
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")
    if not os.access(place, wanted):
        fail(f"cannot write {path}: Permission denied")


def _exists(path: Path) -> bool:
    """Return whether the path exists; raise OSError where it cannot, as below a file."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def write_output(path: Path, data: bytes) -> None:
    """Write a file, or end the program with one line."""
    try:
        path.write_bytes(data)
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")


def fail(message: str) -> NoReturn:
    """End the program with one line on stderr."""
    click.echo(f"genserve: {' '.join(message.split())}", err=True)
    sys.exit(1)
