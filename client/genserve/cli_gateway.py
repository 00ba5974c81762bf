"""Verb that runs the gateway."""

from __future__ import annotations

import click

from genserve.cli_help import examples
from genserve.cli_options import Servers, server_options


@click.command(
    epilog=examples(
        "genserve gateway --url localhost:8001",
        "genserve gateway --url gpu1:8001 --url gpu2:8001 --host 0.0.0.0 --port 80",
    )
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to bind to; 0.0.0.0 for every interface.")
@click.option("--port", type=click.IntRange(1, 65535), default=12411, show_default=True)
@click.option("--cors", "cors_origins", multiple=True, metavar="ORIGIN", help="Web page that may call it. Repeatable.")
@server_options
def gateway(host: str, port: int, cors_origins: tuple[str, ...], servers: Servers) -> None:
    """Serve plain REST, OpenAI's images and Cohere's reranking in front of one or several servers."""
    import uvicorn

    from genserve.gateway.app import create_app
    from genserve.gateway.settings import GatewaySettings

    settings = GatewaySettings(cors_origins=cors_origins)
    app = create_app(settings, servers.async_client())
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False, server_header=False)


VERBS = (gateway,)
