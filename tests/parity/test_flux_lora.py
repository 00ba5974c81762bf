"""LoRA adapters in the FLUX engine against diffusers' ``load_lora_weights`` and ``set_adapters``."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import lora_files
import numpy as np
import plain_flux
import pytest
import torch
from diffusers import FluxPipeline
from flux_engine import EngineRun
from pictures import Pixels, same

from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.request import FluxRequest
from random_flux import write_random_flux

Adapters = list[tuple[str, float]]
CASES: dict[str, Adapters] = {
    "attention": [("attention", 1.0)],
    "weight": [("attention", 0.35)],
    "negative-weight": [("attention", -0.5)],
    "every-layer": [("everything", 0.7)],
    "text-encoder": [("texts", 1.0)],
    "text-encoder-weight": [("texts", 0.5)],
    "kohya": [("kohya", 0.8)],
    "old-keys": [("old", 1.0)],
    "alphas": [("alphas", 1.0)],
    "metadata": [("metadata", 1.0)],
    "two": [("attention", 0.6), ("everything", 0.4)],
    "two-text-encoders": [("texts", 0.8), ("kohya", 0.5)],
    "four": [("attention", 0.4), ("texts", -0.3), ("kohya", 0.5), ("everything", 0.2)],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> FluxCheckpoint:
    path = tmp_path_factory.mktemp("lora") / "dev"
    write_random_flux(path)
    return FluxCheckpoint.load(path)


@pytest.fixture(scope="module")
def plain(checkpoint: FluxCheckpoint) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(checkpoint.path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folder(plain: FluxPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    layers = lora_files.shapes(plain.transformer)
    attention = {name: shape for name, shape in layers.items() if name.endswith(lora_files.ATTENTION)}
    some = {name: shape for name, shape in layers.items() if ".1." in name}
    texts = lora_files.diffusers_keys(lora_files.shapes(plain.text_encoder), 5, prefix="text_encoder", seed=3)
    lora_files.write(folder, "attention", lora_files.diffusers_keys(attention, 4, seed=1))
    lora_files.write_folder(folder, "everything", lora_files.diffusers_keys(layers, 9, seed=2))
    lora_files.write(folder, "texts", texts | lora_files.diffusers_keys(some, 3, seed=4))
    lora_files.write(folder, "kohya", lora_files.kohya_keys(plain.transformer, 4, alpha=2.0, seed=5))
    lora_files.write(folder, "old", lora_files.old_diffusers_keys(lora_files.diffusers_keys(attention, 6, seed=6)))
    alphas = {f"transformer.{name}.alpha": torch.tensor(3.0 + index % 3) for index, name in enumerate(some)}
    lora_files.write(folder, "alphas", lora_files.diffusers_keys(some, 4, seed=7) | alphas)
    metadata = {
        "transformer.r": 8,
        "transformer.lora_alpha": 6,
        "transformer.target_modules": sorted(some),
        "transformer.alpha_pattern": {"to_k": 12, "^transformer_blocks.1.attn.to_q": 2},
        "transformer.use_rslora": True,
    }
    lora_files.write(folder, "metadata", lora_files.diffusers_keys(some, 8, seed=8), metadata)
    return folder


@pytest.fixture(scope="module")
def engine(checkpoint: FluxCheckpoint, folder: Path) -> EngineRun:
    return EngineRun(checkpoint, lora_path=folder)


@pytest.fixture(scope="module")
def reference(plain: FluxPipeline, folder: Path) -> Callable[[FluxRequest], Pixels]:
    """Return the image of a request, made by plain diffusers."""
    known: dict[FluxRequest, Pixels] = {}

    def make(request: FluxRequest) -> Pixels:
        if request not in known:
            names = [adapter.name for adapter in request.lora]
            for name in names:
                path = folder / f"{name}.safetensors"
                plain.load_lora_weights(path if path.exists() else folder / name, adapter_name=name)
            if names:
                plain.set_adapters(names, [adapter.weight for adapter in request.lora])
            known[request] = plain_flux.reference(plain, request)
            plain.unload_lora_weights()
        return known[request]

    return make


def parse(engine: EngineRun, case: str, **values: object) -> FluxRequest:
    lora = json.dumps([{"name": name, "weight": weight} for name, weight in CASES.get(case, [])])
    return engine.parse(**{"STEPS": 3, "SEED": 21, "HEIGHT": 64, "WIDTH": 96, "LORA": lora, **values})


@pytest.mark.parametrize("case", CASES)
def test_image_equals_diffusers(engine: EngineRun, reference: Callable[[FluxRequest], Pixels], case: str) -> None:
    request = parse(engine, case)
    expected = reference(request)
    without = reference(parse(engine, "none"))
    assert np.abs(expected - without).mean() > 3, "the adapter changes nothing that a test could see"
    (image,) = engine.images(request)
    assert np.abs(image - expected).max() <= 1


@pytest.mark.parametrize("max_padding", [0.0, 10.0], ids=["one-size", "sizes-padded"])
def test_mixed_crowd_equals_diffusers(
    checkpoint: FluxCheckpoint, folder: Path, reference: Callable[[FluxRequest], Pixels], max_padding: float
) -> None:
    engine = EngineRun(checkpoint, lora_path=folder, max_padding=max_padding)
    sizes = [{}, {"HEIGHT": 96, "WIDTH": 96}] if max_padding else [{}]
    requests = [
        parse(
            engine, case, STEPS=2 + index % 3, NEGATIVE_PROMPT="green" * (index % 4 == 1), **sizes[index % len(sizes)]
        )
        for index, case in enumerate(["none", *CASES, "none"])
    ]
    results = engine.results(*requests)
    assert max(result.mean_batch_size for result in results) > 4
    for request, image in zip(requests, engine.images(*requests), strict=True):
        assert np.abs(image - reference(request)).max() <= 1, request.lora


def test_images_do_not_depend_on_their_batch(engine: EngineRun) -> None:
    draw = random.Random(6)
    requests = [
        parse(engine, case, PROMPT=f"picture {index % 4}", SEED=index, STEPS=draw.randint(1, 8))
        for index, case in enumerate(["none", *CASES, "none", *CASES])
    ]
    alone = [engine.images(request)[0] for request in requests]
    shuffled = draw.sample(list(enumerate(requests)), len(requests))
    together = engine.images(*(request for _, request in shuffled))
    for (index, request), image in zip(shuffled, together, strict=True):
        assert same(alone[index], image), request


def test_images_without_adapters_are_those_of_an_engine_without(checkpoint: FluxCheckpoint, engine: EngineRun) -> None:
    plain = EngineRun(checkpoint)
    requests = [parse(plain, "none", SEED=seed, STEPS=2 + seed) for seed in range(3)]
    with_folder = engine.images(*requests)
    assert all(np.array_equal(*pair) for pair in zip(plain.images(*requests), with_folder, strict=True))
    crowd = engine.images(*requests, *(parse(engine, case) for case in ("attention", "every-layer", "two")))
    assert all(same(*pair) for pair in zip(with_folder, crowd[:3], strict=True))
