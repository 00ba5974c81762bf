"""Places that must change together: see the map in CONTRIBUTING.md."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import get_args

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from genserve_backend.rerank.checkpoint import Kind
from genserve_backend.rerank.scorers import SCORERS
from genserve_backend.settings import FluxSettings, RerankSettings
from genserve_backend.worker.metrics import Counter, Gauge, Histogram

ROOT = Path(__file__).parents[2]
BACKEND = ROOT / "backend" / "genserve_backend"


def constants(path: Path) -> dict[str, ast.expr]:
    """Return the values assigned to names at the top of a file."""
    statements = ast.parse(path.read_text()).body
    return {
        target.id: statement.value
        for statement in statements
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }


@pytest.mark.parametrize("model", ["flux", "rerank"])
def test_model_py_parses_every_input_of_its_config(model: str) -> None:
    folder = ROOT / "model_repository" / model
    config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    found = constants(folder / "1" / "model.py")
    parsed = [name for key in ("INPUTS", "LIST_INPUTS") if key in found for name in ast.literal_eval(found[key])]
    assert sorted(parsed) == sorted(tensor.name for tensor in config.input)


@pytest.mark.parametrize("engine", ["flux", "rerank"])
def test_every_metric_is_registered_and_counted(engine: str) -> None:
    module = importlib.import_module(f"genserve_backend.{engine}.metrics")
    own = {name: value for name, value in vars(module).items() if isinstance(value, (Gauge, Counter, Histogram))}
    report = (BACKEND / engine / "report.py").read_text()
    assert own
    assert [name for name, metric in own.items() if metric not in module.METRICS or name not in report] == []


def test_every_setting_is_used() -> None:
    sources = [
        path.read_text()
        for folder in ("backend", "client", "model_repository")
        for path in (ROOT / folder).rglob("*.py")
    ]
    names = {*FluxSettings.model_fields, *RerankSettings.model_fields}
    assert [name for name in sorted(names) if not any(f".{name}" in source for source in sources)] == []


def test_every_kind_of_reranker_has_a_scorer() -> None:
    assert set(SCORERS) == set(get_args(Kind))
