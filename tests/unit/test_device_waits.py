"""Steps and forwards do not wait for the device. The tests need no GPU.

The models are on torch's meta device, which rejects operators that read a value back (``item``, ``nonzero``, a mask as
an index). Copies to it are counted: on a GPU, a copy waits for all queued work unless `devices.move` makes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from diffusers import FluxPipeline
from torch.utils._python_dispatch import TorchDispatchMode

from genserve_backend import devices
from genserve_backend.flux import denoise, forward, prompts
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.denoise import Denoiser
from genserve_backend.flux.lora.cache import Adapter, Combination, Part
from genserve_backend.flux.lora.folder import AdapterFile, Version
from genserve_backend.flux.lora.layers import AdaptedModel
from genserve_backend.flux.lora.weights import LowRank
from genserve_backend.flux.prompts import Embedding
from genserve_backend.flux.request import parse
from genserve_backend.flux.schedule import Scheduler
from genserve_backend.flux.state import ImageState
from genserve_backend.flux.step_cache import MagCache
from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.scorers import SCORERS, base
from genserve_backend.worker.engine import Job
from genserve_backend.worker.messages import Submit
from random_flux import write_random_flux

META = torch.device("meta")
SMALL = {"HEIGHT": 64, "WIDTH": 64}
WIDE = {"HEIGHT": 64, "WIDTH": 96}
GUIDED = {"NEGATIVE_PROMPT": "green"}
SKIPPING_RATIOS = (1.0, 1.05, 1.05, 1.02, 1.01)


class Copies(TorchDispatchMode):
    """Records the operators that copy from the CPU to the meta device outside `devices.move`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.waiting: list[str] = []
        self.moved = 0
        self._moving = False
        move = devices.move

        def counted(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
            self._moving = True
            try:
                self.moved += 1
                return move(tensor, device)
            finally:
                self._moving = False

        for module in (devices, denoise, forward, prompts):
            monkeypatch.setattr(module, "move", counted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        from_cpu = any(isinstance(each, torch.Tensor) and each.device.type == "cpu" and each.ndim for each in args)
        if isinstance(result, torch.Tensor) and result.device == META and from_cpu and not self._moving:
            self.waiting.append(str(func))
        return result


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    return Copies(monkeypatch)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> FluxCheckpoint:
    path = tmp_path_factory.mktemp("dev") / "dev"
    write_random_flux(path)
    return FluxCheckpoint.load(path)


@pytest.fixture
def images(checkpoint: FluxCheckpoint) -> tuple[Denoiser, Callable[..., ImageState]]:
    pipeline = FluxPipeline.from_pretrained(checkpoint.path, dtype=torch.bfloat16)
    pipeline.transformer.to(META)
    denoiser = Denoiser(
        pipeline, max_sequence_length=checkpoint.max_sequence_length, step_cache=MagCache(SKIPPING_RATIOS)
    )
    scheduler = Scheduler(pipeline.scheduler)
    config = pipeline.transformer.config
    embedding = Embedding(
        torch.empty(checkpoint.max_sequence_length, config.joint_attention_dim, device=META, dtype=torch.bfloat16),
        torch.empty(config.pooled_projection_dim, device=META, dtype=torch.bfloat16),
    )

    def make(number: int, **values: Any) -> ImageState:
        request = parse({"PROMPT": "a circle", "STEPS": 9, "SEED": number, **values}, checkpoint, max_pixels=2**20)
        submit = Submit(number, str(number), request, time.monotonic() + 60)
        image = ImageState(Job(submit, lambda event: None), request)
        image.schedule = scheduler.plan(request.steps, request.tokens)
        image.latents = denoiser.noise(image)
        image.prompt, image.negative = embedding, embedding if request.guided else None
        return image

    return denoiser, make


def step(denoiser: Denoiser, batch: list[ImageState]) -> None:
    for image, stepped in zip(batch, denoiser.step(batch), strict=True):
        assert stepped.latents.shape == stepped.velocity.shape == image.latents.shape
        image.latents, image.velocity, image.residuals = stepped.latents, stepped.velocity, stepped.residuals
        image.skipped_steps += stepped.skipped
        image.step += 1


def combine(model: AdaptedModel, *ranks: int) -> Combination:
    """Return adapters of every layer, one per rank, on the meta device."""
    options: dict[str, Any] = {"device": META, "dtype": torch.bfloat16}
    return Combination(
        [
            Part(
                Adapter(
                    AdapterFile(str(number), Path(), Version(0, 0, 0)),
                    {
                        "transformer": {
                            name: LowRank(
                                torch.empty(shape.inputs, rank, **options), torch.empty(rank, shape.outputs, **options)
                            )
                            for name, shape in model.shapes.items()
                        }
                    },
                    META,
                ),
                0.5,
            )
            for number, rank in enumerate(ranks)
        ]
    )


@torch.inference_mode()
def test_step_with_adapters_does_not_wait_for_the_device(
    images: tuple[Denoiser, Callable[..., ImageState]], copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, make = images
    model = AdaptedModel(denoiser._transformer, "transformer", device=META, dtype=torch.bfloat16)
    monkeypatch.setattr(denoiser._forward, "_adapters", SimpleNamespace(select=model.select))
    batch = [make(1, **SMALL), make(2, **SMALL, **GUIDED), make(3, **WIDE)]
    with copies:
        batch[0].adapters = combine(model, 4)
        batch[1].adapters = combine(model, 2, 9)
        step(denoiser, batch)
        moved = copies.moved
        for _ in range(3):
            step(denoiser, batch)
        assert copies.moved == moved, "an unchanged batch copies nothing from the host"
        batch.append(make(4, **SMALL))
        batch[-1].adapters = combine(model, 16)
        del batch[0]
        step(denoiser, batch)
    assert copies.waiting == []


@torch.inference_mode()
def test_step_does_not_wait_for_the_device(images: tuple[Denoiser, Callable[..., ImageState]], copies: Copies) -> None:
    denoiser, make = images
    with copies:
        batch = [make(1, **SMALL), make(2, **SMALL, **GUIDED), make(3, **WIDE)]
        step(denoiser, batch)
        moved = copies.moved
        assert moved
        for _ in range(3):
            step(denoiser, batch)
        assert copies.moved == moved, "an unchanged batch copies nothing from the host"
        batch.append(make(4, **SMALL, **GUIDED))  # images join and leave
        del batch[0]
        step(denoiser, batch)
    assert copies.waiting == []


@torch.inference_mode()
def test_skipped_steps_do_not_wait_for_the_device(
    images: tuple[Denoiser, Callable[..., ImageState]], copies: Copies
) -> None:
    denoiser, make = images
    with copies:
        batch = [make(1, **SMALL), make(2, **SMALL, **GUIDED, CACHE=0.5), make(3, **WIDE, CACHE=0.2)]
        for _ in range(8):
            step(denoiser, batch)
    assert [image.skipped_steps > 0 for image in batch] == [False, True, True]
    assert copies.waiting == []


def test_engine_is_at_most_one_step_ahead(
    images: tuple[Denoiser, Callable[..., ImageState]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU queues work without a limit: newcomers and cancellations would wait for all of it."""
    denoiser, make = images
    order: list[str] = []

    class Event:
        def __init__(self, number: int) -> None:
            self.number = number
            order.append(f"mark {number}")

        def synchronize(self) -> None:
            order.append(f"wait for {self.number}")

    numbers = iter(range(9))
    monkeypatch.setattr(denoise, "record_event", lambda device: Event(next(numbers)))
    batch = [make(1, **SMALL)]
    with torch.inference_mode():
        for _ in range(3):
            step(denoiser, batch)
    assert order == ["mark 0", "mark 1", "wait for 0", "mark 2", "wait for 1"]


KINDS = {
    "bi-encoder": tiny_models.bert_bi_encoder,
    "cross-encoder": tiny_models.bert_cross_encoder,
    "cross-encoder with local attention": tiny_models.modern_bert_cross_encoder,
    "causal": tiny_models.qwen3_causal,
}


@pytest.mark.parametrize("is_fused", [True, False], ids=["decoder", "transformers"])
@pytest.mark.parametrize("prefix_cache_bytes", [0, 2**20])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_makes_one_copy(
    kind: str,
    prefix_cache_bytes: int,
    is_fused: bool,
    tmp_path: Path,
    copies: Copies,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if the forward computes missing prefixes, or reads cached ones."""
    if not is_fused:
        monkeypatch.setattr(base, "can_fuse", lambda model, device: False)
    monkeypatch.setattr(base, "copy_back", lambda tensor: (tensor, None))
    checkpoint = RerankCheckpoint.load(KINDS[kind](tmp_path / "model"))
    scorer = SCORERS[checkpoint.kind](
        checkpoint,
        max_length=checkpoint.max_length,
        dtype=torch.bfloat16,
        int8=False,
        compiled=False,
        device=META,
        prefix_cache_bytes=prefix_cache_bytes,
    )
    request = RerankRequest("the capital of France", ("Paris", "Berlin is a city", "", "bamboo " * 20), None)
    sequences = [sequence for part in scorer.tokenize(request) for sequence in part.sequences]
    for forwards in (1, 2):
        with copies:
            outputs = scorer.launch(sequences).outputs()
        assert outputs.shape[0] == len(sequences)
        assert copies.waiting == []
        assert copies.moved == forwards
    assert bool(scorer.prefix_tokens_computed) == (kind == "causal" and prefix_cache_bytes > 0)
