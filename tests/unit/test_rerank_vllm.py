"""Errors of ENGINE=vllm without a usable vllm package. tests/with_vllm tests the package itself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from genserve_backend.checkpoints import CheckpointError
from genserve_backend.rerank.checkpoint import Kind, RerankCheckpoint
from genserve_backend.rerank.scorers import build_scorer, vllm
from genserve_backend.settings import RerankSettings


def load(kind: Kind = "causal", device: str = "cpu") -> Any:
    checkpoint = RerankCheckpoint(Path("/models/some-reranker"), kind, "some-reranker", 512)
    return build_scorer(checkpoint, RerankSettings(model_path=checkpoint.path, engine="vllm"), device)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An empty package named vllm."""
    package = ModuleType("vllm")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    for name in (*vllm.ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.setenv(name, "")
    return package


@pytest.mark.parametrize("kind", ["bi-encoder", "cross-encoder"])
def test_other_kinds_of_reranker_are_rejected(kind: Kind) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(kind)
    assert str(caught.value) == (
        "ENGINE is vllm, which serves causal rerankers (ForCausalLM) alone; /models/some-reranker is a "
        f"{kind}: set ENGINE to torch"
    )


def test_missing_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError) as caught:
        load()
    assert str(caught.value) == "ENGINE is vllm, but the package vllm is not installed in the workers' Python"


def test_broken_package_is_reported(installed: ModuleType) -> None:
    with pytest.raises(CheckpointError, match=r"the package vllm cannot be imported: cannot import name 'LLM'"):
        load()


@pytest.mark.parametrize(
    ("built_for", "device", "message"),
    [
        ("cuda", "cpu", "runs on cuda here, and this instance on cpu"),
        ("cpu", "cuda:0", "runs on cpu here, and this instance on cuda"),
        ("", "cpu", "runs on nothing here, and this instance on cpu"),
    ],
    ids=["gpu-build", "cpu-build", "no-device"],
)
def test_package_for_another_device_is_reported(
    built_for: str, device: str, message: str, installed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed.LLM = object
    platforms: Any = ModuleType("vllm.platforms")
    platforms.current_platform = type("Platform", (), {"device_type": built_for})
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    with pytest.raises(CheckpointError, match=message):
        load(device=device)
