"""Weights in host memory: copies for each use, their order, and the GPU's streams with a mock of torch.cuda."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from flux_engine import EngineRun, pixels
from pictures import same
from torch import nn
from turned_engine import TurnedEngine

from genserve_backend.flux import offload, precision
from genserve_backend.flux.build import assemble, load_pipeline
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.offload import Parked, park, stream
from genserve_backend.settings import FluxSettings
from random_flux import write_random_flux

CPU = torch.device("cpu")
META = torch.device("meta")
SMALL = {"HEIGHT": 64, "WIDTH": 64, "STEPS": 3}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> FluxCheckpoint:
    path = tmp_path_factory.mktemp("offload") / "dev"
    write_random_flux(path)
    return FluxCheckpoint.load(path)


def chain(count: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(count)))


def test_module_has_its_copies_during_its_forward_only() -> None:
    layer = nn.Linear(4, 4)
    host = layer.weight.data_ptr()
    seen: list[int] = []
    inputs = torch.randn(2, 4)
    expected = layer(inputs)
    parked = park(layer, CPU)
    layer.register_forward_hook(lambda *_: seen.append(layer.weight.data_ptr()), prepend=True)
    with torch.inference_mode():
        assert torch.equal(layer(inputs), expected)
        assert torch.equal(layer(inputs), expected)
    assert host not in seen
    assert layer.weight.data_ptr() == host
    assert parked.times == 2


def test_copies_are_dropped_after_a_failure() -> None:
    layer = nn.Linear(4, 4)
    host = layer.weight.data_ptr()
    parked = park(layer, CPU)
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 5))
    assert layer.weight.data_ptr() == host
    layer(torch.randn(2, 4))
    assert parked.times == 2


@pytest.mark.parametrize("again", [False, True], ids=["once", "again"])
def test_next_block_is_copied_while_one_runs(again: bool) -> None:
    blocks = chain(3)
    on_device: list[list[int]] = []
    parked = stream(blocks, CPU, None, again=again)
    for block in blocks:
        block.register_forward_hook(
            lambda *_: on_device.append([index for index, each in enumerate(parked) if each._copies]), prepend=True
        )
    inputs = torch.randn(2, 4)
    for _ in range(2):
        blocks(inputs)
    last = [0, 2] if again else [2]
    assert on_device == [[0, 1], [1, 2], last, [0, 1], [1, 2], last]
    assert [each.times for each in parked] == [3 if again else 2, 2, 2]


def test_failed_block_leaves_the_next_pass_right() -> None:
    blocks = chain(3)
    expected = blocks(inputs := torch.ones(1, 4))
    stream(blocks, CPU, None, again=True)
    broken = blocks[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        blocks(inputs)
    broken.remove()
    assert torch.equal(blocks(inputs), expected)


def test_tied_weights_are_copied_once(checkpoint: FluxCheckpoint) -> None:
    pipeline = FluxPipeline.from_pretrained(checkpoint.path, dtype=torch.float32)
    t5 = pipeline.text_encoder_2
    parked = park(t5, CPU, besides=t5.encoder.block)
    assert {len(tensor) for tensor in parked._tensors} == {t5.config.vocab_size, t5.config.d_model}
    assert len(parked._tensors) == 2


def offloaded(checkpoint: FluxCheckpoint, mode: Any, **settings: Any) -> tuple[TurnedEngine, list[Parked]]:
    """Return an engine whose weights move between the CPU and the CPU."""
    chosen = FluxSettings(model_path=checkpoint.path, **settings)
    pipeline = FluxPipeline.from_pretrained(checkpoint.path, dtype=torch.float32)
    pipeline.vae.to(memory_format=torch.channels_last)
    precision.quantize(pipeline, chosen, "cpu")
    parked = offload.apply(pipeline, mode, CPU)
    return TurnedEngine(lambda emit: assemble(pipeline, checkpoint, chosen, emit)), parked


@pytest.mark.parametrize("mode", ["idle", "blocks"])
def test_engine_makes_the_same_images(mode: Any, checkpoint: FluxCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "use_packed_matrices", lambda model: None)  # packed weights do not move
    plain = EngineRun(checkpoint)
    requests = [plain.parse(SEED=seed, PROMPT=f"picture {seed}", **SMALL) for seed in range(3)]
    expected = plain.images(*requests)
    engine, parked = offloaded(checkpoint, mode)
    before = [each.times for each in parked]
    results = engine.run(*requests)
    assert all(same(pixels(result), image) for result, image in zip(results, expected, strict=True))
    copied = [each.times - times for each, times in zip(parked, before, strict=True)]
    clip, *t5, encode, decode = copied[: 1 + 3 + 2]
    assert [clip, *t5] == [1] * 4, "all prompts are encoded together"
    assert encode == 0
    assert 1 <= decode <= 3
    assert copied[6:] == ([3 + 1, *[3] * 17] if mode == "blocks" else []), "each block once per step"


@pytest.mark.parametrize("t5_dtype", ["auto", "int8wo"])
def test_quantized_weights_move_too(t5_dtype: Any, checkpoint: FluxCheckpoint) -> None:
    plain = EngineRun(checkpoint, dtype="int8wo", t5_dtype=t5_dtype)
    request = plain.parse(SEED=1, **SMALL)
    (expected,) = plain.images(request)
    engine, _ = offloaded(checkpoint, "blocks", dtype="int8wo", t5_dtype=t5_dtype)
    (result,) = engine.run(request)
    assert abs(pixels(result) - expected).max() <= 1


def test_offload_has_no_effect_on_a_cpu(checkpoint: FluxCheckpoint, caplog: pytest.LogCaptureFixture) -> None:
    settings = FluxSettings(model_path=checkpoint.path, offload="blocks")
    pipeline = load_pipeline(checkpoint, settings, "cpu")
    assert "FLUX_OFFLOAD has no effect on a CPU" in caplog.text
    assert not pipeline.transformer.transformer_blocks[0]._forward_pre_hooks


@pytest.mark.parametrize("mode", ["idle", "blocks"])
def test_every_tensor_is_either_on_the_host_or_moved(
    mode: Any, checkpoint: FluxCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = FluxPipeline.from_pretrained(checkpoint.path, dtype=torch.bfloat16)
    parts = {name: getattr(pipeline, name) for name in ("transformer", "text_encoder", "text_encoder_2", "vae")}
    names = {id(tensor): f"{part}.{name}" for part, model in parts.items() for name, tensor in tensors(model)}
    moved: list[str] = []
    tensors_of = offload._tensors

    def move(module: nn.Module, device: torch.device, *, besides: Any) -> None:
        assert device == CPU
        moved.extend(names[id(tensor)] for tensor in tensors_of(module, besides=besides))

    monkeypatch.setattr(offload, "_move", move)
    held = [names[id(tensor)] for parked in offload.apply(pipeline, mode, CPU) for tensor in parked._tensors]
    assert sorted(held + moved) == sorted(names.values())
    assert {name.partition(".")[0] for name in held} == set(parts) - ({"transformer"} if mode == "idle" else set())
    blocks = [name for name in moved if "transformer_blocks." in name]
    assert bool(blocks) == (mode == "idle")
    assert "transformer.x_embedder.weight" in moved


def tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


class MockStream:
    """Records what torch would queue."""

    def __init__(self, name: str, calls: list[Any]) -> None:
        self.name, self.calls = name, calls

    def wait_stream(self, other: MockStream) -> None:
        self.calls.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.calls.append(f"{self.name} waits for {event}")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the calls of streams and events, on a meta device in place of a GPU."""
    calls: list[Any] = []
    current = [MockStream("engine", calls)]

    @contextmanager
    def entered(stream: MockStream | None) -> Iterator[None]:
        current.append(stream or current[-1])
        yield
        current.pop()

    def record(_: torch.device) -> str:
        calls.append(f"event in {current[-1].name}")
        return f"event {len(calls)}"

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(offload, "record_event", record)
    monkeypatch.setattr(offload, "_to_host", lambda tensor, pinned: tensor)  # nothing leaves the meta device
    return calls


def test_copies_follow_the_work_before_them_and_the_block_follows_its_copies(calls: list[Any]) -> None:
    """The memory of the copies may have been that of the block before, which is still running."""
    blocks = chain(2).to(META)
    stream(blocks, META, MockStream("copies", calls), again=False)  # type: ignore[arg-type]
    blocks[0](torch.empty(2, 4, device=META))
    first = ["copies waits for engine", "event in copies", "engine waits for event 2"]
    assert calls == [*first, "copies waits for engine", "event in copies"]
    calls.clear()
    blocks[1](torch.empty(2, 4, device=META))
    assert calls == ["engine waits for event 5"]


def test_parked_module_is_copied_in_the_stream_of_its_thread(calls: list[Any]) -> None:
    layer = nn.Linear(4, 4, device=META)
    park(layer, META)
    layer(torch.empty(2, 4, device=META))
    assert calls == ["event in engine", "engine waits for event 1"]


def test_host_memory_is_pinned_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    Parked([torch.ones(3)], torch.device("cuda", 0), None)
    assert len(pinned) == 1
    Parked([torch.ones(3)], CPU, None)
    assert len(pinned) == 1
