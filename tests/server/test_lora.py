"""Adapters through a real server: a folder, INFO, errors and metrics."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lora_files
import pytest
from conftest import ROOT, Server, serving
from diffusers import FluxTransformer2DModel
from pictures import levels, same

from genserve import Client, InvalidInput

PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    transformer = FluxTransformer2DModel.from_pretrained(ROOT / "demo" / "flux" / "transformer")
    for seed, name in enumerate(("first", "second")):
        lora_files.write(folder, name, lora_files.diffusers_keys(lora_files.shapes(transformer), 4, seed=seed))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from serving(tmp_path_factory, "--model", "flux", "--model", "tasks", LORA_PATH=str(folder))


def test_adapters_are_served(server: Server, folder: Path) -> None:
    lora = [{"name": "first", "weight": 0.5}, {"name": "second", "weight": -0.25}]
    with Client(server.grpc, timeout=120) as client:
        plain = client.generate(PROMPT, steps=2, seed=7)
        changed = client.generate(PROMPT, steps=2, seed=7, lora=lora)
        assert changed.info["lora"] == lora
        assert "lora" not in plain.info
        assert not same(levels(plain.data), levels(changed.data))
        (folder / "damaged.safetensors").write_bytes(b"damaged")
        for name in ("damaged", "missing"):
            with pytest.raises(InvalidInput, match=f"LORA names {name}, but"):
                client.generate(PROMPT, steps=1, lora=[{"name": name, "weight": 1.0}])
        assert (
            levels(client.generate(PROMPT, steps=2, seed=7, lora=lora).data).tolist() == levels(changed.data).tolist()
        )
