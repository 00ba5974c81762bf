"""Help on the command line: examples, and completion by shells."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from genserve.cli import main

BINARIES = Path(sys.executable).parent


def output(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments), prog_name="genserve")
    assert result.exit_code == 0, result.output
    return result.stdout


def examples(verb: str) -> list[str]:
    """Return the command lines at the end of a verb's help."""
    _, heading, text = output(verb, "--help").partition("\n  Examples:\n")
    assert heading, f"{verb} has no examples"
    return [line.strip() for line in text.splitlines() if line.strip()]


def commands(line: str) -> Iterator[list[str]]:
    """Yield the words of each command in a line of shell, without redirections."""
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    command: list[str] = []
    for word in words:
        if re.fullmatch(r"[|&;()<>]+", word):
            yield command
            command = []
        else:
            command.append(word)
    yield command


@pytest.mark.parametrize("verb", sorted(main.commands))
def test_every_verb_has_examples_that_parse(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("documents.txt", "tasks.jsonl"):
        (tmp_path / name).touch()
    lines = examples(verb)
    assert lines
    for line in lines:
        assert len(line) <= 100, "lines are not wrapped"
        (words,) = (words for words in commands(line) if words[:1] == ["genserve"])
        assert words[1] == verb
        with main.commands[verb].make_context(verb, words[2:], parent=click.Context(main)):
            pass


def test_parser_rejects_a_wrong_example() -> None:
    with pytest.raises(click.UsageError):
        main.commands["status"].make_context("status", ["--no-such-option"], parent=click.Context(main))
    assert list(commands("printf 'a|b' | genserve status > 'a file'")) == [
        ["printf", "a|b"],
        ["genserve", "status"],
        ["a file"],
    ]


@pytest.mark.parametrize("shell", ["bash", "fish", "zsh"])
def test_completion_script_calls_the_program(shell: str) -> None:
    script = output("completion", shell)
    assert f"_GENSERVE_COMPLETE={shell}_complete" in script
    assert "genserve" in script


def test_bash_script_is_valid() -> None:
    subprocess.run(["bash", "-n"], input=output("completion", "bash"), text=True, check=True, timeout=60)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("genserve gen", "generate"),
        ("genserve ca", "cancel"),
        ("genserve completion z", "zsh"),
        ("genserve generate --prio", "--priority"),
        ("genserve generate --priority h", "high"),
    ],
)
def test_bash_completes(words: str, found: str) -> None:
    script = output("completion", "bash")
    ask = f"COMP_WORDS=({words}); COMP_CWORD={words.count(' ')}; _genserve_completion genserve; echo ${{COMPREPLY[@]}}"
    path = os.pathsep.join([str(BINARIES), os.environ["PATH"]])
    result = subprocess.run(
        ["bash", "-c", f"{script}\n{ask}"],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert result.stdout.split() == [found], result.stderr


def test_unknown_shell_is_rejected() -> None:
    result = CliRunner().invoke(main, ["completion", "tcsh"])
    assert result.exit_code == 2
    assert "'bash', 'fish', 'zsh'" in result.stderr
