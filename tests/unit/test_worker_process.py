"""Setup of a worker process for its device before it loads a model."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from genserve_backend.settings import ModelSettings, RerankSettings, SettingsError
from genserve_backend.worker.messages import Start
from genserve_backend.worker.process import VISIBLE_GPUS_ENV, hide_other_gpus, load_engine


def start(device: str, **settings: Any) -> Start:
    return Start(f"{__name__}:build", RerankSettings(model_path="unused", **settings), device, "rerank_0")


def build(settings: ModelSettings, device: str, emit: Any) -> Any:
    return device


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        ("cuda:0", None, "0,1"),
        ("cuda:2", None, "2,5"),
        ("cuda:2", "", "2,5"),
        ("cuda:0", "4,7,6", "4,7"),
        ("cuda:1", "GPU-a,GPU-b,GPU-c", "GPU-b,GPU-c"),
    ],
    ids=str,
)
def test_vllm_worker_sees_only_its_gpu_group(
    device: str, visible: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VISIBLE_GPUS_ENV, visible or "")
    if visible is None:
        monkeypatch.delenv(VISIBLE_GPUS_ENV)
    groups = {"gpu_groups": "2,5"} if device == "cuda:2" else {}
    assert hide_other_gpus(start(device, engine="vllm", tensor_parallel_size=2, **groups)) == "cuda:0"
    assert os.environ[VISIBLE_GPUS_ENV] == expected


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        ("cuda:0", None, "0"),
        ("cuda:3", None, "3"),
        ("cuda:1", "4,7,6", "7"),
        ("cuda:1", "GPU-a,GPU-b", "GPU-b"),
        ("cuda:0", "MIG-c", "MIG-c"),
    ],
    ids=str,
)
def test_worker_sees_only_its_gpu(
    device: str, visible: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VISIBLE_GPUS_ENV, visible or "")
    if visible is None:
        monkeypatch.delenv(VISIBLE_GPUS_ENV)
    assert hide_other_gpus(start(device)) == "cuda:0"
    assert os.environ[VISIBLE_GPUS_ENV] == expected


@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_cpu_worker_hides_no_gpus(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE_GPUS_ENV, "4,7,6")
    assert hide_other_gpus(start("cpu", engine=engine)) == "cpu"
    assert os.environ[VISIBLE_GPUS_ENV] == "4,7,6"


def test_invisible_gpu_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE_GPUS_ENV, "4,7")
    with pytest.raises(SettingsError, match="no GPU 2 in CUDA_VISIBLE_DEVICES=4,7"):
        hide_other_gpus(start("cuda:1", engine="vllm", tensor_parallel_size=2))


def test_worker_process_does_not_import_torch_early() -> None:
    code = "import sys; import genserve_backend.worker.process; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, []),
        ({"gpu_memory_utilization": 0.5}, [("share", 0.5, "cuda:0")]),
        ({"gpu_memory_utilization": 0.5, "engine": "vllm"}, []),
    ],
    ids=["free", "limited", "vllm"],
)
def test_memory_limit_applies_to_torch_only(
    settings: dict[str, Any], expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setenv(VISIBLE_GPUS_ENV, "")
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: calls.append(("share", share, device))
    )
    device: Any = load_engine(start("cuda:1", **settings), lambda event: None)
    assert calls == expected
    assert device == "cuda:0"
