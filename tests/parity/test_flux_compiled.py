"""FLUX_COMPILE: images as without it, a fixed number of graphs, and nothing compiled after the start."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import pytest
import torch
from flux_engine import EngineRun, pixels
from plain_flux import load_plain, reference

from genserve_backend import compilation
from genserve_backend.flux import precision
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.compilation import WatchedAttention, warm_up_sizes
from genserve_backend.flux.lora.request import Lora
from genserve_backend.matrices import has_int8
from random_flux import write_random_flux

GRAPHS = 9
"""Two kinds of blocks, with one batch row, several, and several with a mask. A single block that follows a single block
has its tokens in another layout than the first one."""

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"),
    pytest.mark.timeout(1800),  # up to 18 graphs
]


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


@pytest.fixture(scope="module")
def adapters(checkpoint: FluxCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of adapters of some layers, of all, and of none in a block, with different ranks."""
    path = tmp_path_factory.mktemp("adapters")
    layers = lora_files.shapes(load_plain(checkpoint, torch.float32).transformer)
    parts = {
        "attention": (4, [name for name in layers if name.endswith(lora_files.ATTENTION)]),
        "everything": (17, list(layers)),
        "output": (3, ["proj_out"]),
    }
    for seed, (name, (rank, names)) in enumerate(parts.items()):
        lora_files.write(path, name, lora_files.diffusers_keys({each: layers[each] for each in names}, rank, seed=seed))
    return path


@pytest.fixture(scope="module")
def adapted(checkpoint: FluxCheckpoint, folder: Path, adapters: Path) -> EngineRun:
    torch._dynamo.reset()
    before = graphs()
    engine = EngineRun(checkpoint, compiled=True, compile_cache=folder, max_padding=10.0, lora_path=adapters)
    assert graphs() - before == 2 * GRAPHS
    return engine


@pytest.fixture(scope="module")
def eager(checkpoint: FluxCheckpoint, adapters: Path) -> EngineRun:
    return EngineRun(checkpoint, max_padding=10.0, lora_path=adapters)


COMBINATIONS: tuple[dict[str, float], ...] = (
    {"attention": 1.0},
    {"everything": 0.5, "attention": 1.0},
    {"output": -1.0},
    {"everything": 0.7},
    {"attention": 0.3, "output": 0.5, "everything": -0.4},
)


def with_adapters(request: Any, weights: dict[str, float]) -> Any:
    return dataclasses.replace(request, lora=tuple(Lora(name, weight) for name, weight in weights.items()))


def test_forwards_with_adapters_are_compiled_too(adapted: EngineRun, eager: EngineRun) -> None:
    before = graphs()
    some = requests(eager, count=2 * len(COMBINATIONS), seed=5)
    some = [with_adapters(request, weights) for request, weights in zip(some, (*COMBINATIONS, *[{}] * 5), strict=True)]
    expected = [eager.images(request)[0] for request in some]
    plain = [eager.images(with_adapters(request, {}))[0] for request in some[: len(COMBINATIONS)]]
    for image, other in zip(expected, plain, strict=False):
        assert np.abs(image - other).max() > 20  # adapters make a visible difference
    orders = [[number] for number in range(len(some))]
    orders += [[0, 5], [6, 1], [0, 1, 2, 3, 4], [4, 7, 0, 0], [3, 8, 9, 2, 1, 5]]
    for order in orders:
        for number, image in zip(order, adapted.images(*(some[number] for number in order)), strict=True):
            assert np.abs(image - expected[number]).max() <= 1, (order, number)
    assert graphs() == before
    assert eager_shapes(adapted) == 0


def test_images_with_adapters_join_and_leave(adapted: EngineRun, eager: EngineRun) -> None:
    before, draw = graphs(), random.Random(3)
    some = [
        with_adapters(eager.parse(SEED=seed, STEPS=draw.randint(2, 9), HEIGHT=64, WIDTH=96), draw.choice(chosen))
        for seed, chosen in enumerate([COMBINATIONS, ({},)] * 6)
    ]
    jobs = []
    for request in some:
        jobs.append(adapted.submit(request))
        adapted.turn(draw.randint(0, 4))
    for job, request in zip(jobs, some, strict=True):
        assert np.abs(pixels(adapted.answer(job)) - eager.images(request)[0]).max() <= 1, request
    assert graphs() == before
    assert eager_shapes(adapted) == 0


def assert_compiled_is_eager(
    checkpoint: FluxCheckpoint, folder: Path, dtype: str, *, largest: int, mean: float
) -> None:
    """Compare images in levels of 255. Inputs are quantized too: a last bit may become a step of a product's input."""
    torch._dynamo.reset()
    engine = EngineRun(checkpoint, compiled=True, compile_cache=folder, dtype=dtype, max_padding=0.0)
    made = graphs()
    eager = EngineRun(checkpoint, dtype=dtype, max_padding=0.0)
    for seed in range(2):
        some = requests(engine, count=4, seed=seed)
        for image, expected in zip(engine.images(*some), eager.images(*some), strict=True):
            difference = np.abs(image - expected)
            assert difference.mean() <= mean
            assert difference.max() <= largest
    assert graphs() == made
    assert eager_shapes(engine) == 0


@pytest.mark.skipif(not has_int8(), reason="requires VNNI")
def test_int8_is_compiled(checkpoint: FluxCheckpoint, folder: Path) -> None:
    assert_compiled_is_eager(checkpoint, folder, "int8", largest=10, mean=1)


def test_int8_weights_are_compiled(checkpoint: FluxCheckpoint, folder: Path) -> None:
    assert_compiled_is_eager(checkpoint, folder, "int8wo", largest=1, mean=0.1)


def test_float8_is_compiled(checkpoint: FluxCheckpoint, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, which emulates the products. Its images are 3 to 8 levels from those in float32 on average."""
    monkeypatch.setattr(precision, "require_support", lambda settings, device: None)
    assert_compiled_is_eager(checkpoint, folder, "fp8", largest=45, mean=5)


@pytest.mark.parametrize("tokens", [16, 64, 1365, 2730, 4096])
def test_warm_up_sizes_differ_from_the_widths_of_a_model(tokens: int) -> None:
    forwards = warm_up_sizes(tokens, masked=True)
    counts = [[height * width // 256 for height, width in sizes] for sizes in forwards]
    assert [len(each) for each in counts] == [1, 3, 3]
    assert [len(set(each)) for each in counts] == [1, 1, 2]
    assert all(count % 2 for each in counts for count in each)
    assert max(map(max, counts)) <= max(tokens, 35)
    assert warm_up_sizes(tokens, masked=False) == forwards[:2]
