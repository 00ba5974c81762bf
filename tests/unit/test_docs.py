"""Documentation: generated tables, links, line length and completeness."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import genserve
from genserve import Client, errors
from genserve.cli import main
from genserve_backend import board
from genserve_backend.errors import RequestError

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *(ROOT / name / "README.md" for name in ("demo", "docker", "perf"))]
)
MAX_COLUMNS = 120
INTERNAL = {"GENSERVE_BOARD", "GENSERVE_WORKER_PYTHONPATH"}
"""Environment variables that GenServe's processes set for each other."""


@pytest.fixture(scope="module")
def generate() -> Iterator[ModuleType]:
    """docs/generate.py. It imports the adapter with a substitute for Triton's module, and both are removed again."""
    before = set(sys.modules)
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in set(sys.modules) - before:
        if name.startswith(("triton_python_backend_utils", "genserve_backend.adapter")):
            del sys.modules[name]


def page(name: str) -> str:
    return (DOCS / name).read_text()


def prose(text: str) -> list[str]:
    """Return the lines outside of code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE).splitlines()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_generated_tables_match_the_code(path: Path, generate: ModuleType) -> None:
    text = path.read_text()
    assert generate.generated(text) == text, "run python docs/generate.py"


def test_every_generated_table_is_in_the_docs(generate: ModuleType) -> None:
    used = [block[2] for path in PAGES for block in generate.BLOCK.finditer(path.read_text())]
    assert sorted(used) == sorted(generate.BLOCKS)


def test_limits_in_the_text_match_the_code(generate: ModuleType) -> None:
    text = " ".join(page("api.md").split())
    assert f"stored for {board.CANCEL_KEPT_S:g} s" in text
    assert f"{board.FINISHED_KEPT_S:g} s after its end" in text
    assert f"at most {board.LISTED:,} tasks" in text
    assert f"without a sign of life for {board.INSTANCE_READY_S:g} s is not ready" in text
    assert f"after {board.INSTANCE_KEPT_S:g} s it is no longer listed" in text
    assert f"A value of more than {board.SETTING_CHARACTERS:,} characters is cut" in text
    sides = generate.flux.MAX_SIDE
    assert f"A side is at most {sides['jpeg']:,} pixels as JPEG and {sides['webp']:,} as WebP" in text
    assert f"Task ids have at most {generate.MAX_TASK_ID_CHARACTERS} characters" in text


def test_every_error_has_a_triton_code_and_a_client_exception(generate: ModuleType) -> None:
    assert set(generate.CODES) == set(RequestError.__subclasses__())
    assert {kind.__name__ for kind in generate.CODES} <= errors.NAMED.keys()


def test_every_environment_variable_is_documented() -> None:
    text = page("api.md") + page("client.md") + page("gateway.md")
    code = [path.read_text() for folder in ("client", "backend") for path in (ROOT / folder).rglob("*.py")]
    pattern = r'"((?:GENSERVE|FLUX|RERANK|MAX|TASK|GPU|HANG|SAVE|SCORE)_[A-Z_]+|WORKERS)"'
    names = {name for source in code for name in re.findall(pattern, source)}
    assert len(names) > len(INTERNAL)
    assert [name for name in sorted(names - INTERNAL) if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("name", [name for name in vars(Client) if not name.startswith("_")])
def test_every_client_method_is_documented_with_its_arguments(name: str) -> None:
    text = page("client.md")
    assert re.search(rf"\b{name}\(", text) or f"## {name}\n" in text
    for argument in list(inspect.signature(getattr(Client, name)).parameters)[1:]:
        assert argument in text, argument


def test_every_verb_and_exported_name_is_documented() -> None:
    text = page("client.md") + page("api.md")
    types = {"ImageFormat", "ModelStatus", "Priority", "TaskState"}  # their values are listed instead
    missing = [
        name for name in (*main.commands, *(set(genserve.__all__) - types)) if not re.search(rf"\b{name}\b", text)
    ]
    assert missing == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(prose(path.read_text()))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), target
        if anchor:
            headings = [line.lstrip("#").strip() for line in prose(linked.read_text()) if line.startswith("#")]
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_exist(path: Path) -> None:
    """A path starts at the checkout, the backend, the page's folder or, without a folder, among the unit tests."""
    folders = (ROOT, ROOT / "backend" / "genserve_backend", path.parent, ROOT / "tests" / "unit")
    text = path.read_text()
    names = re.findall(r"`([\w./]+\.(?:py|pbtxt|md))`", text) + re.findall(r"\b(?:demo|docs|perf)/[\w/]+\.py\b", text)
    generic = {"model.py", "config.pbtxt", "request.py", "checkpoint.py", "build.py", "engine.py", "metrics.py"}
    generic |= {"report.py", "__init__.py", "cli_serve.py"}
    missing = [name for name in names if not any((folder / name).exists() for folder in folders)]
    assert sorted(set(missing) - generic) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_are_short(path: Path) -> None:
    """Tables and indented output may be longer."""
    lines = [line for line in prose(path.read_text()) if not line.startswith(("|", "    "))]
    assert [line for line in lines if len(line) > MAX_COLUMNS] == []


def test_python_examples_parse() -> None:
    for path in PAGES:
        for code in re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE):
            ast.parse(code)
