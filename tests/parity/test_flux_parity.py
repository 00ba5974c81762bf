"""The `flux` handler against plain diffusers, on the same random checkpoint."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from genserve_backend.errors import Cancelled, DeadlineExceeded, OutOfMemory, ServerError
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.handler import FluxHandler, build
from genserve_backend.flux.request import FluxRequest, FluxResult, parse
from genserve_backend.settings import FluxSettings
from genserve_backend.worker.engine import Job
from genserve_backend.worker.messages import Progress, Submit

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))
from make_flux import make_flux

Make = Callable[..., FluxRequest]


@pytest.fixture(scope="module", params=["dev", "schnell"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FluxCheckpoint:
    path = tmp_path_factory.mktemp(request.param) / request.param
    make_flux(path, schnell=request.param == "schnell")
    return FluxCheckpoint.read(path)


@pytest.fixture(scope="module")
def handler(checkpoint: FluxCheckpoint) -> FluxHandler:
    return build(FluxSettings(model_path=checkpoint.path), "cpu")


@pytest.fixture(scope="module")
def plain(checkpoint: FluxCheckpoint) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(checkpoint.path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def make(checkpoint: FluxCheckpoint) -> Make:
    return lambda **values: parse({"PROMPT": "a red circle", **values}, checkpoint, max_pixels=2**20)


def job(request: FluxRequest, events: list[Any] | None = None, *, within_s: float = 60.0) -> Job:
    submit = Submit(1, "task", request, time.monotonic() + within_s)
    return Job(submit, (events if events is not None else []).append)


def run(handler: FluxHandler, request: FluxRequest) -> FluxResult:
    return handler(request, job(request))


def pixels(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"STEPS": 1, "SEED": 0}, id="one-step"),
        pytest.param({"STEPS": 7, "HEIGHT": 64, "WIDTH": 160, "GUIDANCE": 7.5}, id="wide"),
        pytest.param({"STEPS": 4, "HEIGHT": 256, "WIDTH": 128, "SEED": 2**63 - 1}, id="tall"),
        pytest.param({"STEPS": 4, "NEGATIVE_PROMPT": "green", "TRUE_CFG_SCALE": 3.0}, id="true-cfg"),
        pytest.param({"STEPS": 4, "NEGATIVE_PROMPT": "green", "TRUE_CFG_SCALE": 1.0}, id="true-cfg-without-effect"),
        pytest.param({"STEPS": 2, "PROMPT": "\u7ea2\u8272 \U0001f534 " * 100}, id="long-unicode"),
    ],
)
def test_the_image_is_diffusers_image(
    handler: FluxHandler, plain: FluxPipeline, make: Make, values: dict[str, Any]
) -> None:
    request = make(**{"SEED": 11, **values})
    reference = plain(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt or None,
        true_cfg_scale=request.true_cfg_scale,
        height=request.height,
        width=request.width,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        max_sequence_length=request.max_sequence_length,
        generator=torch.Generator("cpu").manual_seed(request.seed),
    ).images[0]
    assert np.abs(pixels(run(handler, request).image) - np.asarray(reference)).max() <= 1


def test_defaults_are_the_checkpoints(checkpoint: FluxCheckpoint, make: Make) -> None:
    request = make()
    assert (request.height, request.width, request.max_sequence_length) == (128, 128, 64)
    expected = (28, 3.5) if checkpoint.guidance_embeds else (4, 0.0)
    assert (request.steps, request.guidance) == expected


def test_every_step_is_reported(handler: FluxHandler, make: Make) -> None:
    events: list[Any] = []
    request = make(STEPS=3, HEIGHT=64, WIDTH=64)
    handler(request, job(request, events))
    assert events == [Progress(1, step, 3) for step in range(4)]


def test_a_cancelled_or_late_job_stops_at_the_next_step(handler: FluxHandler, make: Make) -> None:
    request = make(STEPS=100)
    cancelled = job(request)
    cancelled.cancelled = True
    with pytest.raises(Cancelled):
        handler(request, cancelled)
    with pytest.raises(DeadlineExceeded):
        handler(request, job(request, within_s=0.0))
    assert run(handler, make(STEPS=1)).image


@pytest.fixture
def broken_transformer(handler: FluxHandler, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    transformer = handler._pipeline.transformer

    def break_it(forward: Callable[..., Any]) -> None:
        monkeypatch.setattr(transformer, "forward", forward)

    return break_it


def test_out_of_memory_is_the_requests_own(
    handler: FluxHandler, make: Make, broken_transformer: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    broken_transformer(out_of_memory)
    with pytest.raises(OutOfMemory, match="128 x 128 pixels"):
        run(handler, make(STEPS=1))
    monkeypatch.undo()
    assert run(handler, make(STEPS=1)).image


def test_latents_that_are_not_finite_are_an_error(
    handler: FluxHandler, make: Make, broken_transformer: Callable[..., None]
) -> None:
    broken_transformer(lambda hidden_states, **_: (torch.full_like(hidden_states, float("nan")),))
    with pytest.raises(ServerError, match="not finite"):
        run(handler, make(STEPS=1))
