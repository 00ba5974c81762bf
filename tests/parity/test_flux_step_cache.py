"""Skipped steps against diffusers' own hooks, and their independence of the batch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import plain_flux
import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxPipeline, MagCacheConfig
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from flux_engine import EngineRun, pixels
from pictures import Pixels, same
from turned_engine import count

from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.metrics import SKIPPED_STEPS, STEPS
from genserve_backend.flux.request import FluxRequest, FluxResult
from genserve_backend.flux.step_cache import Residual
from genserve_backend.worker import engine as worker_engine
from genserve_backend.worker.isolate import DeviceLost
from random_flux import write_random_flux

SMALL = {"HEIGHT": 64, "WIDTH": 64}
METHODS = ("magcache", "first-block")
CASES = {
    "defaults": {"CACHE": 0.24},
    "low": {"CACHE": 0.06},
    "one-step": {"STEPS": 1, "CACHE": 1.0},
    "few-steps": {"STEPS": 4, "CACHE": 1.0},
    "wide": {"STEPS": 20, "HEIGHT": 64, "WIDTH": 160, "CACHE": 0.5},
    "true-cfg": {"STEPS": 12, "NEGATIVE_PROMPT": "green", "TRUE_CFG_SCALE": 3.0, "CACHE": 0.3},
    "many-steps": {"STEPS": 60, "CACHE": 0.1, **SMALL},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> FluxCheckpoint:
    path = tmp_path_factory.mktemp("dev") / "dev"
    write_random_flux(path)
    return FluxCheckpoint.load(path)


class CachedEngine(EngineRun):
    """An engine with a method of skipping steps."""

    def __init__(self, checkpoint: FluxCheckpoint, method: Any, **settings: Any) -> None:
        super().__init__(checkpoint, cache_method=method, **settings)
        self.method = method

    def results(self, *requests: FluxRequest) -> list[FluxResult]:
        return super().results(*requests)


@pytest.fixture(scope="module", params=METHODS)
def engine(request: pytest.FixtureRequest, checkpoint: FluxCheckpoint) -> CachedEngine:
    return CachedEngine(checkpoint, request.param)


@contextmanager
def plain_with_cache(checkpoint: FluxCheckpoint, method: str, request: FluxRequest) -> Iterator[FluxPipeline]:
    pipeline = FluxPipeline.from_pretrained(checkpoint.path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if method == "magcache":
        config: Any = MagCacheConfig(
            threshold=request.cache, num_inference_steps=request.steps, mag_ratios=FLUX_MAG_RATIOS
        )
    else:
        config = FirstBlockCacheConfig(threshold=request.cache)
    pipeline.transformer.enable_cache(config)
    yield pipeline


def reference(checkpoint: FluxCheckpoint, method: str, request: FluxRequest) -> tuple[Pixels, int]:
    """Return diffusers' image with its own hook, and the forwards whose blocks were skipped."""
    with plain_with_cache(checkpoint, method, request) as plain:
        computed: list[int] = []
        plain.transformer.single_transformer_blocks[-1].attn.register_forward_hook(lambda *_: computed.append(1))
        image = plain_flux.reference(plain, request)
    return image, request.steps * request.batch_rows - len(computed)


def cached(engine: EngineRun, **values: Any) -> FluxRequest:
    """Parse a request; the method's name is part of it only for the metadata."""
    return engine.parse(SEED=11, **values)


@pytest.mark.parametrize("case", CASES)
def test_image_equals_that_of_diffusers_hook(engine: CachedEngine, checkpoint: FluxCheckpoint, case: str) -> None:
    request = cached(engine, **CASES[case])
    (result,) = engine.results(request)
    image, skipped_forwards = reference(checkpoint, engine.method, request)
    assert np.abs(pixels(result) - image).max() <= 1
    if engine.method == "magcache" or not request.guided:
        assert result.skipped_steps == skipped_forwards // request.batch_rows
    else:  # the rows of an image are decided one by one
        assert result.skipped_steps <= skipped_forwards // request.batch_rows
    if request.steps > 1 and request.cache > 0.2:  # the first block changes by more than 0.06 at every step
        assert skipped_forwards > 0


def test_more_steps_are_skipped_with_a_higher_threshold(engine: CachedEngine) -> None:
    requests = [cached(engine, CACHE=threshold, **SMALL) for threshold in (0.0, 0.05, 0.3, 1.0)]
    skipped = [result.skipped_steps for result in engine.results(*requests)]
    assert skipped[0] == 0
    assert skipped == sorted(skipped)
    assert len(set(skipped)) == 3


def mixed(engine: EngineRun) -> list[FluxRequest]:
    """Return images with and without a cache, of several sizes, steps and thresholds; some with true guidance."""
    sizes = [(64, 64), (64, 80), (128, 128), (64, 64), (128, 112), (64, 96)]
    return [
        engine.parse(
            PROMPT=f"picture {index}",
            SEED=index,
            STEPS=6 + 5 * (index % 4),
            HEIGHT=height,
            WIDTH=width,
            NEGATIVE_PROMPT="dark" * (index % 3 == 1),
            CACHE=(0.0, 0.1, 0.3, 1.0)[index % 4],
        )
        for index, (height, width) in enumerate(sizes * 2)
    ]


@pytest.mark.parametrize("max_padding", [0.0, 10.0], ids=["sizes-take-turns", "sizes-padded"])
@pytest.mark.parametrize("method", METHODS)
def test_mixed_images_do_not_depend_on_their_batch(checkpoint: FluxCheckpoint, method: str, max_padding: float) -> None:
    engine = CachedEngine(checkpoint, method, max_padding=max_padding)
    requests = mixed(engine)
    alone = [engine.results(request)[0] for request in requests]
    together = engine.results(*requests)
    for request, one, other in zip(requests, alone, together, strict=True):
        assert same(pixels(one), pixels(other)), request
        assert one.skipped_steps == other.skipped_steps, request
    skipped = {request.cache: result.skipped_steps for request, result in zip(requests, together, strict=True)}
    assert [bool(skipped[threshold]) for threshold in (0.0, 0.3, 1.0)] == [False, True, True]
    assert max(result.mean_batch_size for result in together) > 2


def test_preempted_images_keep_their_residuals(checkpoint: FluxCheckpoint) -> None:
    for method in METHODS:
        engine = CachedEngine(checkpoint, method, max_running=2)
        requests = [cached(engine, STEPS=20, CACHE=0.5, PROMPT=f"picture {index}", **SMALL) for index in range(3)]
        alone = [engine.results(request)[0] for request in requests]
        jobs = [engine.submit(request, level=3) for request in requests[:2]]
        engine.turn(8)
        urgent = engine.submit(requests[2], level=1)
        engine.turn(1)
        assert sum(image.preempted and bool(image.residuals[0]) for image in engine.engine._waiting) == 1
        engine.answer(urgent)
        assert jobs[1] not in engine.answers
        results = [engine.answer(job) for job in (*jobs, urgent)]
        for one, other in zip(alone, results, strict=True):
            assert same(pixels(one), pixels(other))
            assert one.skipped_steps == other.skipped_steps > 0


@pytest.mark.parametrize("method", METHODS)
def test_batch_that_fails_between_blocks_is_repeated_from_the_same_state(
    checkpoint: FluxCheckpoint, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = CachedEngine(checkpoint, method)
    requests = [cached(engine, STEPS=20, CACHE=0.3, PROMPT=f"picture {index}", **SMALL) for index in range(5)]
    alone = [engine.results(request)[0] for request in requests]
    forward = engine.engine._denoiser._forward
    real, failures = forward.run_blocks, []

    def run_blocks(states: Any, context: Any, rows: Any, **blocks: Any) -> Any:
        output = real(states, context, rows, **blocks)
        if len(rows.numbers) > 2:
            failures.append(rows)
            raise torch.OutOfMemoryError("CUDA out of memory")  # after the work, with everything but the result
        return output

    monkeypatch.setattr(forward, "run_blocks", run_blocks)
    together = engine.results(*requests)
    assert failures
    for one, other in zip(alone, together, strict=True):
        assert same(pixels(one), pixels(other))
        assert one.skipped_steps == other.skipped_steps > 0


def test_residuals_are_freed_with_their_images(checkpoint: FluxCheckpoint) -> None:
    def held() -> int:
        gc.collect()
        return sum(type(each) is Residual for each in gc.get_objects())

    before = held()
    engine = CachedEngine(checkpoint, "magcache")
    finished = engine.submit(cached(engine, STEPS=6, CACHE=0.3, NEGATIVE_PROMPT="red", **SMALL))
    unwanted = engine.submit(cached(engine, STEPS=50, CACHE=0.3, **SMALL))
    engine.turn(3)
    assert held() - before == 3
    engine.answer(finished)
    engine.turn()
    assert held() - before == 1
    engine.engine.cancel(unwanted)
    engine.turn()
    assert held() == before


def test_residual_holds_no_memory_of_its_batch(checkpoint: FluxCheckpoint) -> None:
    engine = CachedEngine(checkpoint, "magcache", max_padding=10.0)
    engine.submit(cached(engine, CACHE=0.3, **SMALL))
    engine.submit(cached(engine, CACHE=0.3, HEIGHT=128, WIDTH=128))
    engine.turn(2)
    for image in engine.engine._running:
        (residual,) = image.residuals
        assert residual is not None
        assert residual.blocks.untyped_storage().nbytes() == residual.blocks.nbytes
        assert len(residual.blocks) == image.tokens


def test_images_without_cache_keep_nothing(engine: CachedEngine) -> None:
    job = engine.submit(cached(engine, STEPS=4, **SMALL))
    engine.turn(2)
    (image,) = engine.engine._running
    assert image.residuals == (None,)
    assert engine.answer(job).skipped_steps == 0


def test_infinite_states_fail_only_their_image(engine: CachedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    fine = [cached(engine, STEPS=10, CACHE=0.3, PROMPT=f"picture {index}", **SMALL) for index in range(2)]
    alone = engine.results(*fine)
    forward = engine.engine._denoiser._forward
    real = forward.embed_conditioning

    def embed(timesteps: torch.Tensor, guidance: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        rows = real(timesteps, guidance, pooled)
        rows[guidance == 13.0] = float("nan")
        return rows

    monkeypatch.setattr(forward, "embed_conditioning", embed)
    bad = cached(engine, STEPS=10, CACHE=0.3, GUIDANCE=13.0, **SMALL)
    one, error, other = engine.run(fine[0], bad, fine[1])
    assert "not finite" in str(error)
    assert all(same(pixels(a), pixels(b)) for a, b in zip(alone, (one, other), strict=True))


def test_lost_device_ends_the_engine(checkpoint: FluxCheckpoint) -> None:
    engine = CachedEngine(checkpoint, "first-block")

    def run_blocks(*_: Any, **__: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    engine.submit(cached(engine, STEPS=4, CACHE=0.3, **SMALL))
    engine.turn(2)
    engine.engine._denoiser._forward.run_blocks = run_blocks
    with pytest.raises(DeviceLost):
        engine.turn(2)


def test_skipped_steps_are_counted(checkpoint: FluxCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_engine, "HEARTBEAT_S", 0.0)
    engine = CachedEngine(checkpoint, "magcache")
    results = engine.results(*(cached(engine, STEPS=12, CACHE=cache, **SMALL) for cache in (0.0, 0.5, 1.0)))
    engine.turn()
    assert count(engine.heartbeats, STEPS) == 36
    assert count(engine.heartbeats, SKIPPED_STEPS) == sum(result.skipped_steps for result in results) > 0
