"""FLUX_COMPILE: images as without it, a fixed number of graphs, and nothing compiled after the start."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import pytest
import torch
from flux_engine import EngineRun
from plain_flux import load_plain, reference

from genserve_backend import compilation
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.compilation import WatchedAttention, warm_up_sizes
from random_flux import write_random_flux

GRAPHS = 9
"""Two kinds of blocks, with one batch row, several, and several with a mask. A single block that follows a single block
has its tokens in another layout than the first one."""

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> FluxCheckpoint:
    path = tmp_path_factory.mktemp("dev") / "dev"
    write_random_flux(path)
    return FluxCheckpoint.load(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(compilation.FOLDER_ENV, "replaced by the setting")
        yield tmp_path_factory.mktemp("compiled")
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def compiled(checkpoint: FluxCheckpoint, folder: Path) -> EngineRun:
    before = graphs()
    engine = EngineRun(checkpoint, compiled=True, compile_cache=folder, max_padding=10.0)
    assert graphs() - before == GRAPHS
    return engine


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def eager_shapes(engine: EngineRun) -> int:
    attention = engine.engine._denoiser._transformer.transformer_blocks[0].attn.processor
    assert isinstance(attention, WatchedAttention)
    return attention.eager_shapes


def requests(engine: EngineRun, *, count: int, seed: int, **values: Any) -> list[Any]:
    draw = random.Random(seed)
    sides = range(64, 208, 16)
    return [
        engine.parse(
            SEED=number,
            HEIGHT=draw.choice(sides),
            WIDTH=draw.choice(sides),
            NEGATIVE_PROMPT=draw.choice(["", "", "green"]),
            **{"STEPS": 3, **values},
        )
        for number in range(count)
    ]


def test_compiled_images_equal_diffusers(compiled: EngineRun, checkpoint: FluxCheckpoint) -> None:
    plain = load_plain(checkpoint, torch.float32)
    some = [compiled.parse(SEED=3, STEPS=4), *requests(compiled, count=4, seed=1)]
    references = [reference(plain, request) for request in some]
    alone = [compiled.images(request)[0] for request in some]
    for images in (alone, compiled.images(*some)):
        for request, image, expected in zip(some, images, references, strict=True):
            assert np.abs(image - expected).max() <= 1, request
    assert eager_shapes(compiled) == 0


def test_graphs_stay_at_their_bound(compiled: EngineRun) -> None:
    before, draw = graphs(), random.Random(7)
    for number in range(50):
        compiled.run(*requests(compiled, count=draw.randint(1, 5), seed=number, STEPS=1))
    assert graphs() == before
    assert eager_shapes(compiled) == 0


def test_shape_without_code_runs_eagerly_and_is_logged(
    checkpoint: FluxCheckpoint, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()  # code of an earlier engine would fit
    engine = EngineRun(checkpoint, compiled=True, compile_cache=folder, max_padding=0.0)  # no code for masks
    engine.engine._max_padding = 10.0
    before = graphs()
    some = requests(engine, count=3, seed=2)
    plain = load_plain(checkpoint, torch.float32)
    for request, image in zip(some, engine.images(*some), strict=True):
        assert np.abs(image - reference(plain, request)).max() <= 1
    assert graphs() == before
    assert eager_shapes(engine) > 0
    assert "no compiled code for a shape" in caplog.text


def test_second_start_finds_its_code(compiled: EngineRun, checkpoint: FluxCheckpoint, folder: Path) -> None:
    counters = torch._dynamo.utils.counters["inductor"]
    assert counters["fxgraph_cache_miss"] >= GRAPHS  # of the first start
    torch._dynamo.reset()
    before, misses = graphs(), counters["fxgraph_cache_miss"]
    EngineRun(checkpoint, compiled=True, compile_cache=folder, max_padding=10.0)
    assert graphs() - before == GRAPHS
    assert counters["fxgraph_cache_miss"] == misses


def test_forwards_with_adapters_run_eagerly(checkpoint: FluxCheckpoint, folder: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    plain = load_plain(checkpoint, torch.float32)
    layers = lora_files.shapes(plain.transformer)
    attention = {name: shape for name, shape in layers.items() if name.endswith(lora_files.ATTENTION)}
    lora_files.write(tmp_path, "attention", lora_files.diffusers_keys(attention, 4, seed=1))
    lora_files.write(tmp_path, "everything", lora_files.diffusers_keys(layers, 17, seed=2))
    adapters = ["[]", '[{"name": "attention"}]', '[{"name": "everything", "weight": 0.5}, {"name": "attention"}]']
    engine = EngineRun(checkpoint, compiled=True, compile_cache=folder, max_padding=10.0, lora_path=tmp_path)
    made = graphs()
    eager = EngineRun(checkpoint, max_padding=10.0, lora_path=tmp_path)
    for number in range(4):
        some = [
            engine.parse(SEED=each.seed, HEIGHT=each.height, WIDTH=each.width, STEPS=3, LORA=lora)
            for each, lora in zip(requests(engine, count=3, seed=number), adapters, strict=True)
        ]
        for several in (some, [some[1]], [some[2]]):
            for image, expected in zip(engine.images(*several), eager.images(*several), strict=True):
                assert np.abs(image - expected).max() <= 1
    assert graphs() == made


@pytest.mark.parametrize("tokens", [16, 64, 1365, 2730, 4096])
def test_warm_up_sizes_differ_from_the_widths_of_a_model(tokens: int) -> None:
    forwards = warm_up_sizes(tokens, masked=True)
    counts = [[height * width // 256 for height, width in sizes] for sizes in forwards]
    assert [len(each) for each in counts] == [1, 3, 3]
    assert [len(set(each)) for each in counts] == [1, 1, 2]
    assert all(count % 2 for each in counts for count in each)
    assert max(map(max, counts)) <= max(tokens, 35)
    assert warm_up_sizes(tokens, masked=False) == forwards[:2]
