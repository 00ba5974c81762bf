"""Docstrings do not open with a question word."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("backend", "client", "demo", "docs", "model_repository", "perf")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
OPENINGS = {"What", "Who", "How", "Where", "When", "Whether"}


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of every docstring in a file, including those of attributes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            for statement in node.body:
                match statement:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        yield statement.lineno, text


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_docstring_opens_with_a_question_word(path: Path) -> None:
    assert [(line, text) for line, text in docstrings(path) if text.split()[0].strip(",:") in OPENINGS] == []
