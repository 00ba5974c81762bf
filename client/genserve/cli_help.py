"""Help on the command line: examples of the verbs, and completion by shells."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

PROGRAM = "genserve"
SHELLS = ("bash", "fish", "zsh")


def examples(*lines: str) -> str:
    """Return the epilog of a verb's help: command lines, which click leaves as they are."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


@click.command(
    epilog=examples(
        "genserve completion bash > ~/.local/share/bash-completion/completions/genserve",
        "genserve completion fish > ~/.config/fish/completions/genserve.fish",
        "genserve completion zsh > ~/.zfunc/_genserve",
    )
)
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script with which SHELL completes verbs, options and files.

    Every new shell reads the files of the examples; in ~/.zshrc, zsh needs `fpath+=~/.zfunc` before `compinit`. bash
    needs version 4.4 or later.
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"click has no completion for {shell}.")
    verbs = click.get_current_context().find_root().command
    click.echo(kind(verbs, {}, PROGRAM, f"_{PROGRAM.upper()}_COMPLETE").source())


VERBS = (completion,)
