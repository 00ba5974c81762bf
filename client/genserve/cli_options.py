"""Options shared by several verbs, and checks made before a server is called."""

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
from genserve.aio import DEFAULT_TIMEOUT_S, DEFAULT_URL, AsyncClient
from genserve.client import Client
from genserve.protocol import MAX_TASK_ID_CHARACTERS, PRIORITIES

URL_ENV = "GENSERVE_URL"
HEADERS_ENV = "GENSERVE_HEADERS"

Verb = Callable[..., Any]

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
http_port_option = click.option("--http-port", type=click.IntRange(1, 65535), default=8000, show_default=True)

_REQUEST_OPTIONS = (
    click.option("--priority", type=click.Choice(list(PRIORITIES)), default="normal", show_default=True),
    click.option(
        "--timeout", type=float, default=DEFAULT_TIMEOUT_S, show_default=True, help="Seconds for the whole call."
    ),
    click.option(
        "--retry-for",
        type=click.FloatRange(min=0),
        default=0.0,
        show_default=True,
        help="Seconds to retry while no server is reachable.",
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
        help="Server address: HOST:PORT or grpcs://HOST for gRPC, http://HOST:PORT or https://HOST for HTTP."
        f" Repeatable.  [env: {URL_ENV}, comma-separated; default: {DEFAULT_URL}]",
    ),
    click.option(
        "--header",
        "headers",
        multiple=True,
        metavar="'NAME: VALUE'",
        help=f"Header sent with every request, as for a gateway. Repeatable.  [env: {HEADERS_ENV}, one per line]",
    ),
    click.option("--ca", type=Path, envvar="GENSERVE_CA", show_envvar=True, help="Trusted authorities, a PEM file."),
    click.option("--cert", type=Path, envvar="GENSERVE_CERT", show_envvar=True, help="Client certificate, a PEM file."),
    click.option(
        "--key", type=Path, envvar="GENSERVE_KEY", show_envvar=True, help="Key of that certificate, a PEM file."
    ),
)


@dataclass(frozen=True)
class Servers:
    """Servers that a verb calls, with headers and certificates."""

    urls: tuple[str, ...]
    headers: dict[str, str]
    tls: TLS

    @property
    def are_given(self) -> bool:
        """True if the command line names servers."""
        return bool(self.urls)

    def client(self, **options: Any) -> Client:
        """Return a client for these servers, or for the click context's transport if one is set, as in tests."""
        return Client(**self._addresses(), **options)

    def async_client(self, **options: Any) -> AsyncClient:
        """Return an asynchronous client like `client`."""
        return AsyncClient(**self._addresses(), **options)

    def _addresses(self) -> dict[str, Any]:
        transport = click.get_current_context().obj
        if transport is not None:
            return {"transport": transport}
        urls = self.urls or tuple(filter(None, os.environ.get(URL_ENV, "").split(","))) or (DEFAULT_URL,)
        return {"url": urls, "tls": self.tls, "headers": self.headers}


def server_options(verb: Verb) -> Verb:
    """Add the server options to a verb, which receives them as `servers`."""

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
    """Add the request options to a verb: priority, timeout, retry_for and task_id."""
    return _with(_REQUEST_OPTIONS, verb)


def _with(options: Sequence[Callable[[Verb], Verb]], verb: Verb) -> Verb:
    for option in reversed(options):
        verb = option(verb)
    return verb


def _headers(given: tuple[str, ...]) -> dict[str, str]:
    """Return the headers of environment and command line. The command line wins; no message repeats a value."""
    headers: dict[str, str] = {}
    sources = [(HEADERS_ENV, os.environ.get(HEADERS_ENV, "").splitlines()), ("--header", given)]
    for source, lines in sources:
        for line in filter(str.strip, lines):
            name, colon, value = line.partition(":")
            if not colon:
                raise click.BadParameter("a header has no colon; allowed: 'NAME: VALUE'", param_hint=source)
            headers = {key: old for key, old in headers.items() if key.lower() != name.strip().lower()}
            headers[name.strip()] = value.strip()
    return headers


def check_output(path: Path) -> None:
    """Exit with one line if a file cannot be written. Create and change nothing."""
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
    """Return whether the path exists. Raise OSError if it cannot exist, as below a file."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def write_output(path: Path, data: bytes) -> None:
    """Write a file, or exit with one line."""
    try:
        path.write_bytes(data)
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")


def fail(message: str) -> NoReturn:
    """Exit with code 1 and one line on stderr."""
    click.echo(f"genserve: {' '.join(message.split())}", err=True)
    sys.exit(1)
