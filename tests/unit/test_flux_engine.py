"""The FLUX engine: slots, preemption, cancellation, failures and metrics."""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flux_engine import EngineRun, pixels
from pictures import same
from PIL import Image
from turned_engine import PATIENCE_S, count

from genserve_backend.errors import Cancelled, DeadlineExceeded, OutOfMemory, RequestError, ServerError
from genserve_backend.flux import report as report_module
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.metrics import (
    BATCH_SIZE,
    DECODE_SECONDS,
    DENOISE_SECONDS,
    ENCODE_SECONDS,
    EXPIRED,
    PREEMPTIONS,
    REFUSED,
    STEPS,
)
from genserve_backend.flux.request import FluxResult
from genserve_backend.matrices import has_int8
from genserve_backend.worker import engine as worker_engine
from genserve_backend.worker import scheduling
from genserve_backend.worker.isolate import DeviceLost
from genserve_backend.worker.messages import Submit
from genserve_backend.worker.metrics import DEVICE_MEMORY, RUNNING
from random_flux import write_random_flux

SMALL = {"HEIGHT": 64, "WIDTH": 64}
Forward = Callable[..., Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> FluxCheckpoint:
    path = tmp_path_factory.mktemp("dev") / "dev"
    write_random_flux(path)
    return FluxCheckpoint.load(path)


@pytest.fixture(
    scope="module",
    params=["float32", pytest.param("int8", marks=pytest.mark.skipif(not has_int8(), reason="requires VNNI"))],
)
def shared(request: pytest.FixtureRequest, checkpoint: FluxCheckpoint) -> EngineRun:
    return EngineRun(checkpoint, dtype=request.param)


@pytest.fixture
def engine(shared: EngineRun) -> Iterator[EngineRun]:
    """Return the shared engine, and check after the test that it still works."""
    yield shared
    (result,) = shared.run(shared.parse(STEPS=1, **SMALL))
    assert isinstance(result, FluxResult)


@pytest.fixture
def wrap(engine: EngineRun, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[Forward], Forward]], None]:
    """Return a function that replaces a method of a part: ``wrap("vae.decode", lambda real: ...)``.

    The part ``forward`` has the transformer's embedders, blocks and head.
    """
    pipeline = engine.engine._denoiser._pipeline

    def wrap_it(name: str, make: Callable[[Forward], Forward]) -> None:
        part, method = name.split(".")
        owner = engine.engine._denoiser._forward if part == "forward" else getattr(pipeline, part)
        monkeypatch.setattr(owner, method, make(getattr(owner, method)))

    return wrap_it


def kinds(results: list[FluxResult | RequestError]) -> list[type]:
    return [type(result) for result in results]


def test_short_request_leaves_a_running_batch_early(engine: EngineRun) -> None:
    long = engine.submit(engine.parse(STEPS=30, **SMALL))
    engine.turn(5)
    short = engine.submit(engine.parse(STEPS=2, **SMALL))
    assert isinstance(engine.answer(short), FluxResult)
    assert long not in engine.answers
    result = engine.answer(long)
    assert isinstance(result, FluxResult)
    assert result.mean_batch_size == pytest.approx(1 + 2 / 30)


def test_result_has_timings(engine: EngineRun) -> None:
    (result,) = engine.run(engine.parse(STEPS=3))
    assert isinstance(result, FluxResult)
    parts = result.queue_s + result.encode_s + result.denoise_s + result.decode_s
    assert min(result.encode_s, result.denoise_s, result.decode_s) > 0
    assert parts == pytest.approx(result.elapsed_time, rel=0.2, abs=0.01)
    assert result.mean_batch_size == 1
    assert result.dtype == engine.engine._settings.dtype


def test_progress_is_reported_at_intervals(engine: EngineRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "PROGRESS_S", 3600.0)
    monkeypatch.setattr(engine.engine._reporter, "_preview_s", 3600.0)
    quiet = engine.submit(engine.parse(STEPS=5, **SMALL))
    engine.answer(quiet)
    assert [event.step for event in engine.progress[quiet]] == [0]
    monkeypatch.setattr(scheduling, "PROGRESS_S", 0.0)
    told = engine.submit(engine.parse(STEPS=5, **SMALL))
    engine.answer(told)
    assert [(event.step, event.steps) for event in engine.progress[told]] == [(step, 5) for step in range(5)]


def test_previews_are_small_jpegs(engine: EngineRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "MAX_PREVIEW_S", 0.0)
    monkeypatch.setattr(engine.engine._reporter, "_preview_s", 0.0)
    job = engine.submit(engine.parse(STEPS=12, HEIGHT=128, WIDTH=256))
    engine.answer(job)
    previews = [event.preview for event in engine.progress[job] if event.preview]
    assert previews
    image = Image.open(io.BytesIO(previews[-1]))
    assert (image.format, image.size) == ("JPEG", (128, 64))


def test_running_image_can_be_cancelled(engine: EngineRun) -> None:
    unwanted, wanted = (engine.submit(engine.parse(STEPS=20, SEED=seed, **SMALL)) for seed in (1, 2))
    engine.turn(5)
    engine.engine.cancel(unwanted)
    engine.turn()
    assert type(engine.answers[unwanted]) is Cancelled
    assert isinstance(engine.answer(wanted), FluxResult)


def test_image_can_be_cancelled_during_decoding(engine: EngineRun, wrap: Any) -> None:
    hold = threading.Event()

    def held(real: Forward) -> Forward:
        def decode(*arguments: Any, **options: Any) -> Any:
            hold.wait(PATIENCE_S)
            return real(*arguments, **options)

        return decode

    wrap("vae.decode", held)
    first = engine.submit(engine.parse(STEPS=1, **SMALL))
    second = engine.submit(engine.parse(STEPS=1, HEIGHT=64, WIDTH=128))
    engine.turn_until(lambda: engine.engine._decoder.pending == 2)
    engine.engine.cancel(second)
    engine.turn()
    hold.set()
    assert isinstance(engine.answer(first), FluxResult)
    assert type(engine.answer(second)) is Cancelled


def test_running_image_fails_at_its_deadline(engine: EngineRun) -> None:
    late = engine.submit(engine.parse(STEPS=100), within_s=0.2)
    wanted = engine.submit(engine.parse(STEPS=2))
    assert type(engine.answer(late)) is DeadlineExceeded
    assert isinstance(engine.answer(wanted), FluxResult)


def test_waiting_image_fails_at_its_deadline(checkpoint: FluxCheckpoint) -> None:
    engine = EngineRun(checkpoint, max_running=1)
    running = engine.submit(engine.parse(STEPS=40))
    late = engine.submit(engine.parse(STEPS=1), within_s=0.1)
    assert type(engine.answer(late)) is DeadlineExceeded
    assert late not in engine.progress
    assert isinstance(engine.answer(running), FluxResult)


def test_answer_tells_the_time_left(engine: EngineRun) -> None:
    result = engine.answer(engine.submit(engine.parse(STEPS=1, **SMALL), within_s=50.0))
    assert isinstance(result, FluxResult)
    assert 0 < result.deadline_left_s <= 50.0 - result.elapsed_time + 0.01


def teach(engine: EngineRun, seconds: float) -> None:
    """Make an engine believe that a step of a small image takes `seconds`."""
    for _ in range(200):
        engine.engine._costs.observe_step(1, engine.parse(**SMALL).tokens, seconds)


def test_image_that_cannot_meet_its_deadline_is_refused_at_once(
    checkpoint: FluxCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_engine, "HEARTBEAT_S", 0.0)
    engine = EngineRun(checkpoint, policy="slack")
    teach(engine, 10.0)
    refused = engine.submit(engine.parse(STEPS=5, **SMALL), within_s=30.0, has_own_deadline=True)
    patient = engine.submit(engine.parse(STEPS=5, **SMALL), within_s=30.0)
    skipping = engine.submit(engine.parse(STEPS=5, CACHE=0.1, **SMALL), within_s=30.0, has_own_deadline=True)
    engine.turn()
    error = engine.answers[refused]
    assert type(error) is DeadlineExceeded
    assert re.fullmatch(r"the request takes about 50\.0 s on an idle device, and only \d+\.\d s are left", str(error))
    assert isinstance(engine.answer(patient), FluxResult)
    assert isinstance(engine.answer(skipping), FluxResult)
    engine.turn()
    assert (count(engine.heartbeats, REFUSED), count(engine.heartbeats, EXPIRED)) == (1, 0)


def test_image_in_danger_takes_a_slot(checkpoint: FluxCheckpoint) -> None:
    engine = EngineRun(checkpoint, policy="slack", max_running=1)
    patient = engine.submit(engine.parse(STEPS=60, **SMALL))
    engine.turn(3)
    teach(engine, 10.0)  # then less is to spare than the reserve
    tight = engine.submit(engine.parse(STEPS=5, **SMALL), within_s=50.0, has_own_deadline=True)
    assert isinstance(engine.answer(tight), FluxResult)
    assert patient not in engine.answers
    assert isinstance(engine.answer(patient), FluxResult)


def test_engine_learns_the_times_of_its_forwards(checkpoint: FluxCheckpoint) -> None:
    engine = EngineRun(checkpoint)
    costs, tokens = engine.engine._costs, engine.parse(**SMALL).tokens
    engine.run(engine.parse(STEPS=25, **SMALL), engine.parse(STEPS=3, NEGATIVE_PROMPT="green", **SMALL))
    engine.turn()
    assert costs.are_known
    assert [costs.has_measured(rows, tokens) for rows in (1, 2, 3)] == [True, False, True]
    assert min(costs.step_s(1, tokens), costs.encode_s(), costs.decode_s(tokens)) > 0


def test_skipped_steps_teach_nothing(checkpoint: FluxCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineRun(checkpoint)
    learned: list[Any] = []
    monkeypatch.setattr(engine.engine._costs, "observe_step", lambda *shape: learned.append(shape))
    (result,) = engine.results(engine.parse(STEPS=30, CACHE=1.0, **SMALL))
    engine.turn()
    assert result.skipped_steps > 0
    assert len(learned) == 30 - result.skipped_steps


def test_expired_images_are_counted(checkpoint: FluxCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_engine, "HEARTBEAT_S", 0.0)
    engine = EngineRun(checkpoint)
    late = engine.submit(engine.parse(STEPS=100), within_s=0.05)
    assert type(engine.answer(late)) is DeadlineExceeded
    engine.turn()
    assert (count(engine.heartbeats, REFUSED), count(engine.heartbeats, EXPIRED)) == (0, 1)


def test_preempted_images_continue_unchanged(checkpoint: FluxCheckpoint) -> None:
    engine = EngineRun(checkpoint, max_running=2)
    requests = [engine.parse(STEPS=20, SEED=seed, **SMALL) for seed in range(3)]
    alone = [engine.images(request)[0] for request in requests]
    jobs = [engine.submit(request, level=3) for request in requests[:2]]
    engine.turn(6)
    urgent = engine.submit(requests[2], level=1)
    engine.turn(1)
    assert type(engine.answer(urgent)) is FluxResult
    assert jobs[1] not in engine.answers
    together = [pixels(engine.answer(job)) for job in (*jobs, urgent)]
    assert all(same(*pair) for pair in zip(alone, together, strict=True))
    engine.turn_until(lambda: count(engine.heartbeats, PREEMPTIONS) == 1)


def test_image_above_the_token_limit_runs_alone(checkpoint: FluxCheckpoint) -> None:
    engine = EngineRun(checkpoint, max_batched_tokens=64, max_padding=10.0)
    small, large = engine.parse(STEPS=3, **SMALL), engine.parse(STEPS=3, HEIGHT=192, WIDTH=192)
    results = engine.run(small, small, large)
    assert [result.mean_batch_size for result in results if isinstance(result, FluxResult)] == [2, 2, 1]


def test_infinite_latents_fail_only_their_request(engine: EngineRun, wrap: Any) -> None:
    def with_nan(real: Forward) -> Forward:
        def embed(timesteps: torch.Tensor, guidance: torch.Tensor, pooled: torch.Tensor) -> Any:
            rows = real(timesteps, guidance, pooled)
            rows[guidance == 13.0] = float("nan")
            return rows

        return embed

    fine = [engine.parse(STEPS=3, SEED=seed, **SMALL) for seed in range(3)]
    alone = [engine.images(request)[0] for request in fine]
    wrap("forward.embed_conditioning", with_nan)
    bad = engine.parse(STEPS=3, GUIDANCE=13.0, **SMALL)
    results = engine.run(fine[0], bad, *fine[1:])
    error = results.pop(1)
    assert type(error) is ServerError
    assert "not finite" in str(error)
    assert all(same(one, pixels(result)) for one, result in zip(alone, results, strict=True))


def out_of_memory_above(rows: int) -> Callable[[Forward], Forward]:
    def make(real: Forward) -> Forward:
        def embed(latents: torch.Tensor) -> Any:
            if latents.shape[0] * latents.shape[1] > rows:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(latents)

        return embed

    return make


def test_batch_that_does_not_fit_is_halved(engine: EngineRun, wrap: Any) -> None:
    requests = [engine.parse(STEPS=4, SEED=seed, **SMALL) for seed in range(7)]
    alone = [engine.images(request)[0] for request in requests]
    wrap("forward.embed_image", out_of_memory_above(3 * 16))
    results = engine.run(*requests)
    assert all(same(one, pixels(result)) for one, result in zip(alone, results, strict=True))


def test_image_that_does_not_fit_alone_gets_out_of_memory(engine: EngineRun, wrap: Any) -> None:
    wrap("forward.embed_image", out_of_memory_above(100))
    results = engine.run(
        engine.parse(STEPS=3, **SMALL), engine.parse(STEPS=3, HEIGHT=192, WIDTH=192), engine.parse(STEPS=3, **SMALL)
    )
    assert kinds(results) == [FluxResult, OutOfMemory, FluxResult]
    assert "192 x 192 pixels" in str(results[1])


def test_failing_decoding_fails_only_its_request(engine: EngineRun, wrap: Any) -> None:
    def broken(real: Forward) -> Forward:
        def decode(latents: torch.Tensor, **options: Any) -> Any:
            if latents.shape[-1] == 24:
                raise torch.OutOfMemoryError("CUDA out of memory")
            if latents.shape[-1] == 16 and len(latents) > 1:
                raise ValueError("secret")
            return real(latents, **options)

        return decode

    wrap("vae.decode", broken)
    sizes = [(64, 64), (192, 192), (128, 128), (128, 128), (128, 128)]
    results = engine.run(*(engine.parse(STEPS=1, HEIGHT=height, WIDTH=width) for height, width in sizes))
    assert kinds(results) == [FluxResult, OutOfMemory, FluxResult, FluxResult, FluxResult]


def test_failing_prompt_fails_only_its_request(engine: EngineRun, monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine.engine._encoder._forward

    def forward(texts: Any) -> Any:
        if "bad prompt" in texts:
            raise ValueError("secret")
        return real(texts)

    monkeypatch.setattr(engine.engine._encoder, "_forward", forward)
    good, bad = engine.parse(STEPS=1, PROMPT="new", **SMALL), engine.parse(STEPS=1, PROMPT="bad prompt", **SMALL)
    results = engine.run(good, bad, good)
    assert kinds(results) == [FluxResult, ServerError, FluxResult]
    assert "secret" not in str(results[1])


def test_lost_device_ends_the_engine(checkpoint: FluxCheckpoint) -> None:
    engine = EngineRun(checkpoint)

    def forward(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    engine.engine._denoiser._forward.embed_image = forward
    engine.submit(engine.parse(STEPS=1, **SMALL))
    with pytest.raises(DeviceLost):
        engine.turn(3)


@pytest.mark.parametrize("thread", ["decode", "write"])
def test_heartbeats_report_a_hanging_thread(
    thread: str, checkpoint: FluxCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_engine, "HEARTBEAT_S", 0.0)
    engine = EngineRun(checkpoint)
    hold = threading.Event()
    owner, name = {
        "decode": (engine.engine._decoder._pipeline, "_unpack_latents"),
        "write": (engine.engine._decoder._archive, "save"),
    }[thread]
    original = getattr(owner, name)

    def hang(*arguments: Any) -> Any:
        hold.wait(PATIENCE_S)
        return original(*arguments)

    monkeypatch.setattr(owner, name, hang)
    job = engine.submit(engine.parse(STEPS=1, **SMALL))
    engine.turn_until(lambda: bool(engine.heartbeats) and engine.heartbeats[-1].stalled_s > 0.2)
    hold.set()
    assert isinstance(engine.answer(job), FluxResult)
    engine.turn_until(lambda: engine.heartbeats[-1].stalled_s == 0.0)


def test_timings_start_at_the_arrival(engine: EngineRun) -> None:
    arrived = time.monotonic() - 5.0
    engine.engine.submit(Submit(77, "t", engine.parse(STEPS=1, **SMALL), time.monotonic() + 60, arrived=arrived))
    result = engine.answer(77)
    assert isinstance(result, FluxResult)
    assert 5.0 <= result.queue_s <= result.elapsed_time < 15.0


def test_heartbeats_carry_the_metrics(checkpoint: FluxCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_engine, "HEARTBEAT_S", 0.0)
    engine = EngineRun(checkpoint)
    engine.run(*(engine.parse(STEPS=steps, **SMALL) for steps in (2, 3)))
    engine.turn()
    assert count(engine.heartbeats, STEPS) == 5
    sizes = (size for heartbeat in engine.heartbeats for size in heartbeat.observations[BATCH_SIZE])
    assert sorted(sizes) == [1, 2, 2]
    for stage in (ENCODE_SECONDS, DENOISE_SECONDS, DECODE_SECONDS):
        assert count(engine.heartbeats, stage) > 0
    assert max(heartbeat.gauges[RUNNING] for heartbeat in engine.heartbeats) == 2
    assert engine.heartbeats[-1].gauges[RUNNING] == 0
    assert engine.heartbeats[-1].gauges[DEVICE_MEMORY] > 1e6


def test_engine_grants_its_free_slots(checkpoint: FluxCheckpoint) -> None:
    engine = EngineRun(checkpoint, max_running=3, max_gpu_queue_size=0)
    engine.turn()
    assert engine.granted == 3
    for _ in range(3):
        engine.submit(engine.parse(STEPS=5, **SMALL))
    engine.turn(3)
    assert engine.granted == 3
    engine.turn_until(lambda: len(engine.answers) == 3)
    engine.turn()
    assert engine.granted == 6


def test_images_are_archived(checkpoint: FluxCheckpoint, tmp_path: Path) -> None:
    engine = EngineRun(checkpoint, save_test_images=tmp_path / "kept")
    job = engine.submit(engine.parse(STEPS=1, FORMAT="webp", **SMALL))
    result = engine.answer(job)
    assert isinstance(result, FluxResult)
    assert (tmp_path / "kept" / f"task-{job}.webp").read_bytes() == result.image
