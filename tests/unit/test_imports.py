"""Import rules of docs/architecture.md, checked on the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "model.py": {"adapter", "flux", "rerank", "shared"},
    "adapter": {"worker", "shared"},
    "flux": {"worker", "shared"},
    "rerank": {"worker", "shared"},
    "worker": {"shared"},
    "shared": set(),
    "client": set(),
    "serve": {"client", "flux", "rerank", "worker", "shared"},
    "tune": {"client", "serve", "flux", "shared"},
    "gateway": {"client"},
    "command line": {"client", "gateway", "serve", "tune"},
}
"""Layers that each layer may import, besides itself. `shared` are the modules next to the packages, as settings."""
TORCH = {"torch", "diffusers", "transformers", "vllm"}


def modules() -> dict[str, Path]:
    """Return the files of both distributions and the models, by module name."""
    found = {}
    for folder in (ROOT / "backend", ROOT / "client"):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for path in (ROOT / "model_repository").glob("*/1/model.py"):
        found[f"model_repository.{path.parts[-3]}"] = path
    return found


MODULES = modules()


def layer(module: str) -> str:
    package, _, rest = module.partition(".")
    first = rest.partition(".")[0]
    if package == "model_repository":
        return "model.py"
    if package == "genserve":
        return (
            first
            if first in {"gateway", "serve", "tune"}
            else "command line"
            if first in {"cli", "__main__"} or first.startswith("cli_")
            else "client"
        )
    return first if first in ALLOWED else "shared"


def imports(module: str, *, lazy: bool) -> Iterator[str]:
    """Yield the modules that a module imports, with those inside functions if `lazy`."""
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in names)


def own_imports(module: str, *, lazy: bool) -> set[str]:
    return {name for name in imports(module, lazy=lazy) if name in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    imported = {layer(name) for name in own_imports(module, lazy=True)} - {layer(module)}
    assert imported <= ALLOWED[layer(module)]


def test_no_module_imports_itself_in_a_circle() -> None:
    TopologicalSorter({module: own_imports(module, lazy=False) for module in MODULES}).prepare()


@pytest.mark.parametrize("start", [name for name in MODULES if layer(name) in {"model.py", "client", "serve", "tune"}])
def test_stub_client_serve_and_tune_import_no_torch(start: str) -> None:
    """Triton's stubs hold no device, and the client is thin."""
    seen, ahead = set[str](), {start}
    while ahead:
        module = ahead.pop()
        seen.add(module)
        assert not {name.partition(".")[0] for name in imports(module, lazy=False)} & TORCH, module
        ahead |= own_imports(module, lazy=False) - seen


@pytest.mark.parametrize("module", [name for name in MODULES if layer(name) in {"flux", "rerank", "worker", "shared"}])
def test_only_the_adapter_knows_triton(module: str) -> None:
    assert "triton_python_backend_utils" not in set(imports(module, lazy=True))
