"""Adapters in the FLUX engine: loading, errors, changes of files, memory, cancellation and metrics."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lora_files
import pytest
import torch
from diffusers import FluxPipeline
from flux_engine import EngineRun, pixels
from pictures import same
from PIL import Image
from turned_engine import PATIENCE_S, count

from genserve_backend.errors import Cancelled, DeadlineExceeded, InvalidInput, OutOfMemory, RequestError, ServerError
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.image_file import embedded_settings
from genserve_backend.flux.lora import loader as loader_module
from genserve_backend.flux.lora.cache import Adapter
from genserve_backend.flux.metrics import ADAPTER_BYTES, ADAPTER_EVICTIONS, ADAPTER_LOADS, ADAPTERS, PREEMPTIONS
from genserve_backend.flux.request import FluxRequest, FluxResult
from genserve_backend.worker import engine as worker_engine
from genserve_backend.worker import isolate as isolate_module
from random_flux import write_random_flux

SMALL = {"HEIGHT": 64, "WIDTH": 64, "STEPS": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> FluxCheckpoint:
    path = tmp_path_factory.mktemp("dev") / "dev"
    write_random_flux(path)
    return FluxCheckpoint.load(path)


@pytest.fixture(scope="module")
def adapters(checkpoint: FluxCheckpoint) -> dict[str, lora_files.Tensors]:
    """Return three adapters; `c` has products for CLIP."""
    pipeline = FluxPipeline.from_pretrained(checkpoint.path)
    layers = {
        name: shape
        for name, shape in lora_files.shapes(pipeline.transformer).items()
        if name.endswith(lora_files.ATTENTION)
    }
    texts = lora_files.diffusers_keys(lora_files.shapes(pipeline.text_encoder), 4, prefix="text_encoder", seed=9)
    found = {name: lora_files.diffusers_keys(layers, 4, seed=seed) for seed, name in enumerate("abc")}
    return {**found, "c": found["c"] | texts}


@pytest.fixture
def folder(adapters: dict[str, lora_files.Tensors], tmp_path: Path) -> Path:
    for name, tensors in adapters.items():
        lora_files.write(tmp_path, name, tensors)
    return tmp_path


@pytest.fixture
def engine(checkpoint: FluxCheckpoint, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineRun]:
    """Return an engine, and check after the test that it still works and holds nothing in use."""
    monkeypatch.setattr(worker_engine, "HEARTBEAT_S", 0.0)
    engine = EngineRun(checkpoint, lora_path=folder, lora_cache_bytes=2**30)
    yield engine
    (result,) = engine.run(request(engine))
    assert isinstance(result, FluxResult)
    engine.turn()
    models = engine.engine._adapters._models.values()
    assert sum(model.nbytes for model in models) == 0


def request(engine: EngineRun, *names: str, weight: float = 1.0, **values: Any) -> FluxRequest:
    lora = json.dumps([{"name": name, "weight": weight} for name in names if name])
    return engine.parse(**{**SMALL, "SEED": 3, "LORA": lora, **values})


def gauge(engine: EngineRun, metric: Any) -> float:
    engine.turn()
    value: float = engine.heartbeats[-1].gauges[metric]
    return value


def bad_files(folder: Path, adapters: dict[str, lora_files.Tensors]) -> dict[str, str]:
    """Write unusable adapters; return a part of the reason by name."""
    tensors = adapters["a"]
    key = next(iter(tensors))
    (folder / "damaged.safetensors").write_bytes((folder / "a.safetensors").read_bytes()[:5_000])
    lora_files.write(folder, "nan", {**tensors, key: torch.full_like(tensors[key], float("nan"))})
    lora_files.write(folder, "shape", {**tensors, key: torch.ones(4, 3)})
    lora_files.write(folder, "layer", {**tensors, "transformer.unknown.lora_A.weight": torch.ones(1, 1)})
    lora_files.write(folder, "dora", {**tensors, f"{key[:-14]}.lora_magnitude_vector": torch.ones(3)})
    lora_files.write(folder, "rank", lora_files.diffusers_keys({"x_embedder": lora_files.Shape(64, 64)}, 257))
    return {
        "missing": "the server has no adapter of this name",
        "damaged": "damaged",
        "nan": "not finite",
        "shape": "have the shapes",
        "layer": "its layer unknown is not in the model's transformer",
        "dora": "DoRA",
        "rank": "allowed",
    }


def test_unusable_adapters_fail_only_their_request(
    engine: EngineRun, folder: Path, adapters: dict[str, lora_files.Tensors]
) -> None:
    reasons = bad_files(folder, adapters)
    fine = [request(engine, *names) for names in ("a", "", "b")]
    alone = [engine.images(each)[0] for each in fine]
    on_device, held = gauge(engine, ADAPTERS), gauge(engine, ADAPTER_BYTES)
    for _ in range(2):  # the second time, the reason is remembered
        answers = engine.run(fine[0], *(request(engine, "a", name) for name in reasons), *fine[1:])
        images = [answers[0], *answers[-2:]]
        assert all(same(one, pixels(answer)) for one, answer in zip(alone, images, strict=True))
        for (name, reason), answer in zip(reasons.items(), answers[1:-2], strict=True):
            assert type(answer) is InvalidInput
            assert str(answer).startswith(f"LORA names {name}, but ")
            assert reason in str(answer)
    assert gauge(engine, ADAPTERS) == on_device
    assert gauge(engine, ADAPTER_BYTES) == held


def test_server_without_a_folder_has_no_adapters(checkpoint: FluxCheckpoint) -> None:
    engine = EngineRun(checkpoint)
    answer, image = engine.run(request(engine, "a"), request(engine))
    assert type(answer) is InvalidInput
    assert str(answer) == "LORA is a list with a; allowed: [] (the server has no folder of adapters)"
    assert isinstance(image, FluxResult)


def test_too_large_file_is_refused(checkpoint: FluxCheckpoint, folder: Path) -> None:
    engine = EngineRun(checkpoint, lora_path=folder, lora_max_bytes=1_000)
    (answer,) = engine.run(request(engine, "a"))
    assert type(answer) is InvalidInput
    assert "allowed: at most 1,000" in str(answer)


def test_images_with_different_adapters_share_forwards(engine: EngineRun) -> None:
    requests = [request(engine, *names, STEPS=20) for names in ("a", "b", "c", "ab", "", "")]
    results = engine.results(*requests)
    assert min(result.mean_batch_size for result in results) > 4
    images = [pixels(result) for result in results]
    assert same(images[4], images[5])
    assert not any(same(images[0], image) for image in images[1:])


def test_new_and_changed_files_are_used_without_a_restart(
    engine: EngineRun, folder: Path, adapters: dict[str, lora_files.Tensors]
) -> None:
    first = request(engine, "a")
    (before,) = engine.images(first)
    job = engine.submit(request(engine, "a", STEPS=30))
    engine.turn_until(lambda: job in engine.progress)
    lora_files.write(folder, "new", adapters["b"])
    lora_files.write(folder, "a", {key: tensor * 1.5 for key, tensor in adapters["b"].items()})
    other, new, changed = engine.images(request(engine, "b"), request(engine, "new"), first)
    assert same(other, new)
    assert not same(before, changed)
    assert job not in engine.answers
    assert gauge(engine, ADAPTERS) == 4, "both versions of a, b and new"
    in_flight = pixels(engine.answer(job))
    lora_files.write(folder, "a", adapters["a"])
    assert same(in_flight, engine.images(request(engine, "a", STEPS=30))[0])
    assert same(before, engine.images(first)[0])
    (folder / "a.safetensors").unlink()
    (answer,) = engine.run(first)
    assert type(answer) is InvalidInput


def test_adapters_are_dropped_beyond_the_budget(
    checkpoint: FluxCheckpoint, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_engine, "HEARTBEAT_S", 0.0)
    engine = EngineRun(checkpoint, lora_path=folder, lora_cache_bytes=0)
    requests = [request(engine, name) for name in "abab"]
    images = engine.images(*requests)
    assert same(images[0], images[2])
    assert gauge(engine, ADAPTERS) == 0
    assert gauge(engine, ADAPTER_BYTES) == 0
    assert count(engine.heartbeats, ADAPTER_LOADS) == 2
    assert count(engine.heartbeats, ADAPTER_EVICTIONS) == 2


def test_loaded_adapters_stay_within_the_budget(engine: EngineRun) -> None:
    for _ in range(2):
        engine.images(request(engine, "a"), request(engine, "a", "b"))
    assert gauge(engine, ADAPTERS) == 2
    assert gauge(engine, ADAPTER_BYTES) == 2 * engine.engine._adapters._cache.on_device()[0].nbytes
    assert count(engine.heartbeats, ADAPTER_LOADS) == 2
    assert count(engine.heartbeats, ADAPTER_EVICTIONS) == 0


def test_text_encoder_is_adapted_for_its_request_only(engine: EngineRun) -> None:
    encoder = engine.engine._encoder
    seen: list[int] = []
    handle = encoder._pipeline.text_encoder.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    values = {"PROMPT": "a new prompt"}
    requests = [request(engine, **values), *(request(engine, "c", weight=weight, **values) for weight in (1.0, 0.5))]
    images = engine.images(*requests, request(engine, "a", **values))
    assert sum(seen) == 3, "one text without adapters, which `a` shares, and one per weight"
    again = engine.images(*reversed(requests))
    handle.remove()
    assert sum(seen) == 3, "all are cached"
    assert all(same(*pair) for pair in zip(images[:3], reversed(again), strict=True))
    assert not same(images[1], images[2])


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Return an event without which no adapter's file is read."""
    event = threading.Event()
    real = loader_module.read_bytes

    def wait(*arguments: Any, **options: Any) -> bytes:
        event.wait(PATIENCE_S)
        return real(*arguments, **options)

    monkeypatch.setattr(loader_module, "read_bytes", wait)
    yield event
    event.set()


def test_nobody_waits_for_a_file(engine: EngineRun, held: threading.Event) -> None:
    waiting = engine.submit(request(engine, "a"))
    (result,) = engine.run(request(engine))
    assert isinstance(result, FluxResult)
    assert waiting not in engine.answers
    engine.turn_until(lambda: engine.heartbeats[-1].stalled_s > 0.1)
    held.set()
    assert isinstance(engine.answer(waiting), FluxResult)


def test_image_can_be_cancelled_while_its_adapter_is_loaded(engine: EngineRun, held: threading.Event) -> None:
    unwanted, late, wanted = (
        engine.submit(request(engine, "a"), within_s=within_s) for within_s in (PATIENCE_S, 0.05, PATIENCE_S)
    )
    engine.turn()
    engine.engine.cancel(unwanted)
    assert type(engine.answer(unwanted)) is Cancelled
    assert type(engine.answer(late)) is DeadlineExceeded
    held.set()
    assert isinstance(engine.answer(wanted), FluxResult)


def test_running_image_with_an_adapter_can_be_cancelled(engine: EngineRun) -> None:
    unwanted, wanted = (engine.submit(request(engine, name, STEPS=20)) for name in "ab")
    engine.turn_until(lambda: {unwanted, wanted} <= engine.progress.keys())
    engine.turn(3)
    engine.engine.cancel(unwanted)
    engine.turn()
    assert type(engine.answers[unwanted]) is Cancelled
    assert same(pixels(engine.answer(wanted)), engine.images(request(engine, "b", STEPS=20))[0])


def test_requests_whose_files_are_read_count_as_waiting(engine: EngineRun, held: threading.Event) -> None:
    engine.turn()
    granted = engine.granted
    for _ in range(granted):
        engine.submit(request(engine, "a"))
    engine.turn(20)
    assert engine.granted == granted
    held.set()
    engine.turn_until(lambda: len(engine.answers) == granted)


def test_preempted_images_keep_their_adapters(checkpoint: FluxCheckpoint, folder: Path) -> None:
    engine = EngineRun(checkpoint, lora_path=folder, max_running=2, lora_cache_bytes=0)
    requests = [request(engine, name, STEPS=12, SEED=seed) for seed, name in enumerate("abc")]
    alone = [engine.images(each)[0] for each in requests]
    jobs = [engine.submit(each, level=3) for each in requests[:2]]
    engine.turn_until(lambda: set(jobs) <= engine.progress.keys())
    engine.turn(3)
    urgent = engine.submit(requests[2], level=1)
    together = [pixels(engine.answer(job)) for job in (urgent, *jobs)]
    assert all(same(*pair) for pair in zip([alone[2], *alone[:2]], together, strict=True))
    engine.turn_until(lambda: count(engine.heartbeats, PREEMPTIONS) == 1)


def failing(raised: type[Exception], above: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(real: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden_states: torch.Tensor, **rest: Any) -> Any:
            if len(hidden_states) > above:
                raise raised("secret")
            return real(hidden_states=hidden_states, **rest)

        return forward

    return make


@pytest.mark.parametrize("raised", [torch.OutOfMemoryError, RuntimeError], ids=["memory", "defect"])
def test_failed_batch_is_halved(engine: EngineRun, raised: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request(engine, name, SEED=seed) for seed, name in enumerate(["a", "b", "", "c", "a"])]
    alone = [engine.images(each)[0] for each in requests]
    transformer = engine.engine._denoiser._transformer
    monkeypatch.setattr(transformer, "forward", failing(raised, 2)(transformer.forward))
    results = engine.run(*requests)
    assert all(same(one, pixels(result)) for one, result in zip(alone, results, strict=True))


@pytest.mark.parametrize(
    ("raised", "kind"),
    [(torch.OutOfMemoryError, OutOfMemory), (RuntimeError, ServerError)],
    ids=["memory", "defect"],
)
def test_adapter_that_does_not_fit_on_the_device_fails_its_request(
    engine: EngineRun, raised: type[Exception], kind: type[RequestError], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Adapter.place

    def place(adapter: Adapter) -> None:
        if adapter.name == "b":
            raise raised("secret")
        real(adapter)

    with monkeypatch.context() as patch:
        patch.setattr(Adapter, "place", place)
        patch.setattr(isolate_module.logger, "error", lambda *_, **__: None)  # pytest would keep the traceback's frames
        answers = engine.run(*(request(engine, *names) for names in ("a", "b", "ab", "")))
    assert [type(answer) for answer in answers] == [FluxResult, kind, kind, FluxResult]
    assert "secret" not in str(answers[1])
    assert isinstance(engine.run(request(engine, "b"))[0], FluxResult)


def test_defect_of_the_loader_is_a_server_error(engine: EngineRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(loader_module, "read_weights", fail)
        (answer,) = engine.run(request(engine, "a"))
    assert type(answer) is ServerError
    assert "secret" not in str(answer)
    assert isinstance(engine.run(request(engine, "a"))[0], FluxResult)


def test_adapters_are_in_the_metadata(engine: EngineRun) -> None:
    with_adapters, without = engine.results(request(engine, "a", "b", weight=0.5), request(engine))
    settings = [embedded_settings(Image.open(io.BytesIO(each.image))) for each in (with_adapters, without)]
    assert settings[0]["lora"] == [{"name": "a", "weight": 0.5}, {"name": "b", "weight": 0.5}]
    assert "lora" not in settings[1]
