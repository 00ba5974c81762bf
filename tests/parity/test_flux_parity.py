"""The FLUX engine against plain diffusers, on the same random checkpoint."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from flux_engine import EngineRun, pixels
from pictures import same
from plain_flux import load_plain, reference

from genserve_backend.flux import denoise
from genserve_backend.flux.attention import complex_rotation, real_rotation, rotate, rotate_pairs
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.request import FluxResult
from genserve_backend.matrices import has_int8
from random_flux import write_random_flux

needs_int8 = pytest.mark.skipif(not has_int8(), reason="requires VNNI")
CASES = {
    "defaults": {},
    "one-step": {"STEPS": 1, "SEED": 0},
    "wide": {"STEPS": 7, "HEIGHT": 64, "WIDTH": 160, "GUIDANCE": 7.5},
    "tall": {"STEPS": 4, "HEIGHT": 256, "WIDTH": 128, "SEED": 2**63 - 1},
    "large": {"STEPS": 3, "HEIGHT": 320, "WIDTH": 320, "GUIDANCE": 0.0},
    "true-cfg": {"STEPS": 4, "NEGATIVE_PROMPT": "green", "TRUE_CFG_SCALE": 3.0},
    "true-cfg-wide": {"STEPS": 5, "HEIGHT": 64, "WIDTH": 160, "NEGATIVE_PROMPT": "blue", "TRUE_CFG_SCALE": 1.5},
    "true-cfg-without-effect": {"STEPS": 4, "NEGATIVE_PROMPT": "green", "TRUE_CFG_SCALE": 1.0},
    "long-unicode": {"STEPS": 2, "PROMPT": "\u7ea2\u8272 \U0001f534 " * 100},
    "many-steps": {"STEPS": 50, "HEIGHT": 64, "WIDTH": 64},
}


@pytest.fixture(scope="module", params=["dev", "schnell"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FluxCheckpoint:
    path = tmp_path_factory.mktemp(request.param) / request.param
    write_random_flux(path, schnell=request.param == "schnell")
    return FluxCheckpoint.load(path)


@pytest.fixture(scope="module")
def engine(checkpoint: FluxCheckpoint) -> EngineRun:
    return EngineRun(checkpoint)


@pytest.fixture(scope="module")
def plain(checkpoint: FluxCheckpoint) -> FluxPipeline:
    return load_plain(checkpoint, torch.float32)


@pytest.mark.parametrize("case", CASES)
def test_image_equals_diffusers(engine: EngineRun, plain: FluxPipeline, case: str) -> None:
    request = engine.parse(**{"SEED": 11, **CASES[case]})
    (image,) = engine.images(request)
    assert np.abs(image - reference(plain, request)).max() <= 1


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "true-cfg"])
def test_gpu_rotation_gives_the_same_images(
    guided: bool, checkpoint: FluxCheckpoint, plain: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoise, "complex_rotation", real_rotation)
    engine = EngineRun(checkpoint, max_padding=10.0)
    more = {"NEGATIVE_PROMPT": "green"} if guided else {}
    requests = [engine.parse(SEED=5, STEPS=4, **size, **more) for size in ({}, {"HEIGHT": 64, "WIDTH": 160})]
    for request, image in zip(requests, engine.images(*requests), strict=True):
        assert np.abs(image - reference(plain, request)).max() <= 1


def test_both_rotations_agree() -> None:
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(2, 7, 3, 16, generator=draw)
    angles = torch.rand(7, 8, generator=draw) * 6
    cosines, sines = (part.repeat_interleave(2, dim=-1) for part in (angles.cos(), angles.sin()))
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        one, other = (
            rotate(states.to(dtype), rotation(cosines, sines)[None, :, None])
            for rotation in (complex_rotation, real_rotation)
        )
        assert one.dtype == other.dtype == dtype
        assert (one.float() - other.float()).abs().max() <= tolerance


def test_compiled_rotation_agrees_with_the_others() -> None:
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(2, 7, 3, 16, generator=draw)
    angles = torch.rand(7, 8, generator=draw) * 6
    rotation = real_rotation(*(part.repeat_interleave(2, dim=-1) for part in (angles.cos(), angles.sin())))
    expected = rotate(states, rotation[None, :, None])
    assert (rotate_pairs(states, rotation[None, :, None]) - expected).abs().max() <= 1e-6
    assert rotate_pairs(states.bfloat16(), rotation[None, :, None]).dtype == torch.bfloat16


def test_batched_images_equal_diffusers(engine: EngineRun, plain: FluxPipeline) -> None:
    requests = [engine.parse(**{"SEED": 12, **values}) for values in CASES.values()]
    for case, request, image in zip(CASES, requests, engine.images(*requests), strict=True):
        assert np.abs(image - reference(plain, request)).max() <= 1, case


@pytest.mark.parametrize("max_padding", [0.0, 10.0], ids=["sizes-take-turns", "sizes-padded"])
def test_mixed_sizes_equal_diffusers(checkpoint: FluxCheckpoint, plain: FluxPipeline, max_padding: float) -> None:
    engine = EngineRun(checkpoint, max_padding=max_padding)
    sizes = [(64, 64), (64, 160), (128, 128), (192, 64), (256, 128)]
    requests = [
        engine.parse(HEIGHT=height, WIDTH=width, STEPS=3 + index, SEED=index, NEGATIVE_PROMPT="red" * (index % 2))
        for index, (height, width) in enumerate(sizes)
    ]
    results = engine.run(*requests)
    for request, result in zip(requests, results, strict=True):
        assert np.abs(pixels(result) - reference(plain, request)).max() <= 1
    shared = [isinstance(result, FluxResult) and result.mean_batch_size > 1 for result in results]
    assert all(shared) if max_padding else not any(shared)


def test_bfloat16_stays_close_to_diffusers(checkpoint: FluxCheckpoint) -> None:
    """Images differ by more than a level, because bfloat16 rounds differently in batches, but show the same picture."""
    engine, plain = EngineRun(checkpoint, dtype="bfloat16"), load_plain(checkpoint, torch.bfloat16)
    requests = [engine.parse(STEPS=steps, SEED=steps) for steps in (2, 4, 8)]
    for request, image in zip(requests, engine.images(*requests), strict=True):
        assert np.abs(image - reference(plain, request)).mean() < 4


def test_images_do_not_depend_on_their_batch(engine: EngineRun) -> None:
    draw = random.Random(5)
    requests = [
        engine.parse(
            PROMPT=f"picture {index}",
            SEED=index,
            STEPS=draw.randint(1, 12),
            GUIDANCE=draw.choice([0.0, 1.0, 3.5, 10.0]),
            HEIGHT=draw.choice([64, 128, 192]),
            WIDTH=draw.choice([64, 128, 160]),
            NEGATIVE_PROMPT=draw.choice(["", "", "dark"]),
        )
        for index in range(24)
    ]
    alone = [engine.images(request)[0] for request in requests]
    shuffled = draw.sample(list(enumerate(requests)), len(requests))
    together = engine.images(*(request for _, request in shuffled))
    for (index, request), image in zip(shuffled, together, strict=True):
        assert same(alone[index], image), request


@pytest.mark.parametrize("dtype", [pytest.param("int8", marks=needs_int8), "int8wo"])
def test_quantized_images_do_not_depend_on_their_batch(
    dtype: str, checkpoint: FluxCheckpoint, plain: FluxPipeline
) -> None:
    engine = EngineRun(checkpoint, dtype=dtype)
    sizes = [(64, 64), (112, 128), (128, 128)]
    requests = [
        engine.parse(PROMPT=f"picture {index}", HEIGHT=height, WIDTH=width, STEPS=4 + index, SEED=index)
        for index, (height, width) in enumerate([*sizes, *sizes])
    ]
    alone = [engine.images(request)[0] for request in requests]
    for request, one, image in zip(requests, alone, engine.images(*requests), strict=True):
        assert same(one, image), request
        assert 0 < np.abs(one - reference(plain, request)).mean() < 20


def test_defaults_come_from_the_checkpoint(checkpoint: FluxCheckpoint, engine: EngineRun) -> None:
    request = engine.parse()
    assert (request.height, request.width, request.max_sequence_length) == (128, 128, 64)
    expected = (28, 3.5) if checkpoint.guidance_embeds else (4, 0.0)
    assert (request.steps, request.guidance) == expected
