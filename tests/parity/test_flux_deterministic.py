"""FLUX_DETERMINISTIC: the same bytes alone, in a crowd, and after a preemption."""

from __future__ import annotations

from typing import Any

import pytest
from flux_engine import EngineRun
from turned_engine import count

from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.metrics import PREEMPTIONS
from genserve_backend.flux.request import FluxRequest, FluxResult
from random_flux import write_random_flux

CASES: tuple[dict[str, Any], ...] = (
    {"STEPS": 4},
    {"STEPS": 2, "GUIDANCE": 9.0, "PROMPT": "a castle on a hill"},
    {"STEPS": 3, "HEIGHT": 112, "PROMPT": "a cat sleeping on a blue sofa"},
    {"STEPS": 2, "HEIGHT": 64, "WIDTH": 160, "NEGATIVE_PROMPT": "blurry"},
    {"STEPS": 2, "NEGATIVE_PROMPT": "text", "PROMPT": "a whale flying over the mountains"},
    {"STEPS": 3, "WIDTH": 112, "PROMPT": "a sailing boat"},
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> FluxCheckpoint:
    path = tmp_path_factory.mktemp("dev") / "dev"
    write_random_flux(path)
    return FluxCheckpoint.load(path)


def make(checkpoint: FluxCheckpoint, dtype: str, **settings: Any) -> EngineRun:
    # Without a cache, prompts are encoded again beside others; padding would let sizes share a forward.
    given = {"deterministic": True, "max_padding": 10.0, "prompt_cache_bytes": 0, **settings}
    return EngineRun(checkpoint, dtype=dtype, **given)


def requests(engine: EngineRun) -> list[FluxRequest]:
    return [engine.parse(**{"SEED": number, **values}) for number, values in enumerate(CASES)]


def files(engine: EngineRun, *some: FluxRequest) -> list[bytes]:
    return [result.image for result in engine.results(*some)]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(checkpoint: FluxCheckpoint, dtype: str) -> EngineRun:
    return make(checkpoint, dtype)


@pytest.fixture(scope="module")
def alone(engine: EngineRun) -> list[bytes]:
    return [files(engine, request)[0] for request in requests(engine)]


def test_images_are_the_same_in_a_crowd(engine: EngineRun, alone: list[bytes]) -> None:
    assert files(engine, *requests(engine)) == alone
    assert files(engine, *reversed(requests(engine))) == alone[::-1]


def test_images_are_the_same_when_they_join_and_leave(engine: EngineRun, alone: list[bytes]) -> None:
    jobs = []
    for request in requests(engine):
        jobs.append(engine.submit(request))
        engine.turn(2)
    assert [engine.answer(job).image for job in jobs] == alone


def test_images_are_the_same_after_a_preemption(checkpoint: FluxCheckpoint, dtype: str, alone: list[bytes]) -> None:
    engine = make(checkpoint, dtype, max_running=1)
    first, *others = requests(engine)
    preempted = engine.submit(first, level=3)
    engine.turn(2)
    urgent = [engine.submit(request, level=1) for request in others]
    assert [engine.answer(job).image for job in (preempted, *urgent)] == alone
    assert count(engine.heartbeats, PREEMPTIONS) or engine.engine._reporter._counts[PREEMPTIONS]


def test_images_share_nothing_with_others(checkpoint: FluxCheckpoint, dtype: str) -> None:
    """Without the setting, images share forwards, encodings and decodings; with it, none of the three."""
    for deterministic in (True, False):
        engine = make(checkpoint, dtype, deterministic=deterministic)
        pipeline = engine.engine._denoiser._pipeline
        sizes: dict[str, list[int]] = {"encoded": [], "decoded": []}

        def look(name: str, sizes: dict[str, list[int]] = sizes) -> Any:
            return lambda module, given: sizes[name].append(len(given[0]))

        pipeline.text_encoder_2.register_forward_pre_hook(look("encoded"))
        pipeline.vae.decoder.register_forward_pre_hook(look("decoded"))
        same = [engine.parse(PROMPT=f"picture {seed}", SEED=seed, STEPS=2) for seed in range(4)]
        results = engine.results(*same)
        assert all(isinstance(result, FluxResult) for result in results)
        shared = [result.mean_batch_size for result in results]
        assert shared == ([1.0] * 4 if deterministic else [4.0] * 4)
        assert sizes["encoded"] == ([1] * 4 if deterministic else [4])
        assert max(sizes["decoded"]) == 1 or not deterministic
