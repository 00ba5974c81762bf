"""Command line. A verb that fails prints one line on stderr and exits with code 1."""

from __future__ import annotations

from typing import Any

import click

from genserve import cli_calls, cli_gateway, cli_help, cli_inspect, cli_map, cli_serve, cli_tune
from genserve.cli_options import fail
from genserve.errors import GenServeError


class Group(click.Group):
    """Command group that turns expected errors into one line on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except GenServeError as error:
            fail(f"{type(error).__name__}: {error}")
        except ModuleNotFoundError as error:
            fail(f"{error.name} is not installed; {ctx.info_name} needs: pip install 'genserve[serve]'")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="genserve")
def main() -> None:
    """Serve and call FLUX and rerankers on Triton."""


for module in (cli_calls, cli_map, cli_inspect, cli_serve, cli_tune, cli_gateway, cli_help):
    for verb in module.VERBS:
        main.add_command(verb)
