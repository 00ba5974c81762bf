"""Verbs that run the gateway and draw its keys."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import click

from genserve.cli_gateway_tasks import chosen_database, task_options
from genserve.cli_help import examples
from genserve.cli_options import Servers, fail, json_option, server_options

PACKAGES = (
    "aiosqlite",
    "fastapi",
    "limits",
    "prometheus_client",
    "pydantic",
    "sqlalchemy",
    "sse_starlette",
    "standardwebhooks",
    "uvicorn",
)
"""Packages of the extra `gateway`."""
KEYS_ENV = "GENSERVE_GATEWAY_KEYS"
MODELS = ("flux", "rerank")
DRAIN_S = 30
"""Seconds for requests in flight to finish when the gateway stops."""


def require_gateway() -> None:
    """Exit with one line if a package of the extra is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        fail(f"the gateway needs {', '.join(missing)}: pip install 'genserve[gateway]'")


def _aliases(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    """Return the models by the further names of the option."""
    pairs = [each.rpartition("=") for each in given]
    wrong = [each for each, (name, _, model) in zip(given, pairs, strict=True) if not name or model not in MODELS]
    if wrong:
        raise click.BadParameter(f"{wrong[0]!r} is not NAME=MODEL; allowed models: {', '.join(MODELS)}")
    return {name: model for name, _, model in pairs}


@click.group(
    invoke_without_command=True,
    epilog=examples(
        "genserve gateway --url localhost:8001",
        "genserve gateway --url gpu1:8001 --url gpu2:8001 --host 0.0.0.0 --port 80",
        "genserve gateway key alice --keys keys.txt",
        "genserve gateway --keys keys.txt --rate 60/minute --concurrency 4",
    ),
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to bind to; 0.0.0.0 for every interface.")
@click.option("--port", type=click.IntRange(1, 65535), default=12411, show_default=True)
@click.option(
    "--cors",
    "cors_origins",
    multiple=True,
    metavar="ORIGIN",
    envvar="GENSERVE_GATEWAY_CORS",
    show_envvar=True,
    help="Web page that may call it. Repeatable.",
)
@click.option(
    "--alias",
    "aliases",
    multiple=True,
    metavar="NAME=MODEL",
    callback=_aliases,
    envvar="GENSERVE_GATEWAY_ALIASES",
    show_envvar=True,
    help="Further name of a model in requests, as ms-marco=rerank. Repeatable.",
)
@click.option(
    "--keys",
    metavar="FILE",
    envvar=KEYS_ENV,
    show_envvar=True,
    help="File of the keys that callers need; in the environment, also its lines.  [default: no keys]",
)
@click.option(
    "--rate",
    metavar="N/TIME",
    envvar="GENSERVE_GATEWAY_RATE",
    show_envvar=True,
    help="Most requests of a key, or of an address without keys, as 60/minute.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    envvar="GENSERVE_GATEWAY_CONCURRENCY",
    show_envvar=True,
    help="Most requests at once of a key, or of an address without keys.",
)
@click.option(
    "--proxy",
    "proxies",
    multiple=True,
    metavar="ADDRESS",
    envvar="GENSERVE_GATEWAY_PROXY",
    show_envvar=True,
    help="Address or network of a proxy in front, whose X-Forwarded-For counts. Repeatable.",
)
@task_options
@server_options
@click.pass_context
def gateway(
    context: click.Context,
    host: str,
    port: int,
    cors_origins: tuple[str, ...],
    aliases: dict[str, Any],
    keys: str | None,
    rate: str | None,
    concurrency: int | None,
    proxies: tuple[str, ...],
    durable: dict[str, Any],
    servers: Servers,
) -> None:
    """Serve plain REST, OpenAI's images and Cohere's reranking in front of one or several servers."""
    require_gateway()
    if context.invoked_subcommand:
        return
    import pydantic
    import uvicorn

    from genserve.gateway import logs
    from genserve.gateway.app import create_app
    from genserve.gateway.connections import TimedProtocol
    from genserve.gateway.durable import prepare
    from genserve.gateway.keys import KeysError
    from genserve.gateway.limiter import Limits
    from genserve.gateway.settings import GatewaySettings

    logs.configure()
    if keys is None and KEYS_ENV in os.environ:  # as a secret that is missing
        fail(
            f"{KEYS_ENV} is empty; allowed: a file of keys or its lines, or no such variable for a gateway without keys"
        )
    try:
        limits = Limits.parse(rate=rate, concurrency=concurrency)
        settings = GatewaySettings(
            cors_origins=cors_origins,
            aliases=aliases,
            keys=keys,
            limits=limits,
            **{**durable, "tasks": chosen_database(durable["tasks"], port)},
        )
        app = create_app(settings, servers.async_client())
        if settings.tasks:
            asyncio.run(prepare(settings.tasks))
    except KeysError as error:
        fail(str(error))
    except pydantic.ValidationError as error:
        raise click.UsageError(
            "; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors())
        ) from None
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")
    # Modules and routes stay until the end. Looking through them again and again took a third of a request's time.
    gc.collect()
    gc.freeze()
    uvicorn.run(
        app,
        host=host,
        port=port,
        http=TimedProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(proxies),
        forwarded_allow_ips=list(proxies),
        timeout_graceful_shutdown=DRAIN_S,
    )


@gateway.command(epilog=examples("genserve gateway key alice --keys keys.txt --rate 10/minute"))
@click.argument("name")
@click.option(
    "--keys", "path", type=click.Path(path_type=Path, dir_okay=False), required=True, help="File that gets its line."
)
@click.option("--rate", metavar="N/TIME", help="Most requests of this key, as 60/minute.")
@click.option("--concurrency", type=click.IntRange(min=1), help="Most requests at once of this key.")
@json_option
def key(name: str, path: Path, rate: str | None, concurrency: int | None, as_json: bool) -> None:
    """Draw a key for the caller NAME, print it, and append its hash to a file.

    The key is not shown again. To withdraw it, remove its line; a running gateway reads the file again.
    """
    from genserve.gateway.keys import KeysError, draw_key

    try:
        drawn = draw_key(path, name, {"rate": rate, "concurrency": concurrency})
    except KeysError as error:
        fail(str(error))
    click.echo(json.dumps({"name": name, "key": drawn}) if as_json else drawn)


VERBS = (gateway,)
