"""Reckoned memory of FLUX, and the settings that make it fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from genserve_backend.checkpoints import CheckpointError
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.memory import CHOICES, RESERVE, Part, Sizes, advise, flux_1_dev, need
from genserve_backend.flux.precision import quantize
from genserve_backend.settings import FluxSettings
from gpu.flux_models import _dev_parts
from random_flux import random_parts, write_random_flux

GIB = 2**30
GPU = "cuda:0"


def settings(**values: Any) -> FluxSettings:
    return FluxSettings(model_path=Path("m"), **values)


def values(model: nn.Module) -> dict[str, int]:
    return {name: tensor.numel() for name, tensor in model.named_parameters()}


@pytest.fixture(scope="module")
def dev() -> Sizes:
    return flux_1_dev()


def test_flux_1_dev_has_its_published_sizes(dev: Sizes) -> None:
    with torch.device("meta"):
        parts = _dev_parts(whole=True)
    for part, mine in (("transformer", dev.transformer), ("text_encoder_2", dev.t5)):
        theirs = Part.of(values(parts[part]))
        assert mine.rest == theirs.rest
        assert mine.blocks.keys() == theirs.blocks.keys()
        for name, block in theirs.blocks.items():
            assert sum(mine.blocks[name].values()) == sum(block.values()), name
    assert dev.clip == sum(values(parts["text_encoder"]).values())
    assert dev.vae == sum(values(parts["vae"]).values())
    assert dev.width == parts["transformer"].inner_dim
    assert dev.vae_width == parts["vae"].config.block_out_channels[0]
    # The forms of matrices follow from the true names as from the abridged ones.
    true_names = Sizes(**{**vars(dev), "transformer": Part.of(values(parts["transformer"]))})
    for dtype in ("fp8", "int8wo", "int8"):
        mine, theirs_need = (need(each, settings(dtype=dtype), GPU) for each in (dev, true_names))
        assert mine.weights == pytest.approx(theirs_need.weights, rel=1e-3)


@pytest.mark.parametrize("dtype", ["fp8", "int8wo", "bfloat16"])
@pytest.mark.parametrize("t5_dtype", ["auto", "int8wo"])
def test_weights_are_those_of_the_modules(dtype: Any, t5_dtype: Any) -> None:
    parts = random_parts(seed=0, schnell=False)
    named = {part: getattr(parts, part) for part in ("transformer", "text_encoder", "text_encoder_2", "vae")}
    for model in named.values():
        model.to(torch.bfloat16)
    sizes = Sizes(
        transformer=Part.of(values(named["transformer"])),
        t5=Part.of(values(named["text_encoder_2"])),
        clip=sum(values(named["text_encoder"]).values()),
        vae=sum(values(named["vae"]).values()),
        width=64,
        vae_width=16,
        native_size=128,
        text_tokens=64,
    )
    chosen = settings(dtype=dtype, t5_dtype=t5_dtype)
    expected = need(sizes, chosen, GPU).weights
    quantize(parts, chosen, "cpu")  # type: ignore[arg-type]
    scales = positions = held = 0
    for model in named.values():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(".scale"):
                scales += tensor.nbytes
            elif name.endswith(("position_ids", "inv_freq")):
                positions += tensor.nbytes
            else:
                held += tensor.nbytes
    assert held == expected
    assert (scales > 0) == (dtype != "bfloat16" or t5_dtype != "auto")


def test_offload_takes_weights_off_the_device(dev: Sizes) -> None:
    plain, idle, blocks = (need(dev, settings(offload=mode), GPU) for mode in ("none", "idle", "blocks"))
    transformer = 2 * (dev.transformer.rest + sum(sum(block.values()) for block in dev.transformer.blocks.values()))
    everything = plain.weights
    assert plain.passing == plain.host == 0
    assert idle.weights == transformer
    assert idle.weights + idle.host == everything
    assert blocks.weights == 2 * dev.transformer.rest
    assert blocks.weights + blocks.host == everything
    largest = max(sum(block.values()) for block in dev.transformer.blocks.values())
    assert blocks.passing - idle.passing == 2 * 2 * largest
    assert plain.forwards == idle.forwards == blocks.forwards


def test_forwards_follow_the_limits(dev: Sizes) -> None:
    def step_and_decoding(**values: Any) -> float:
        return need(dev, settings(prompt_cache_bytes=0, **values), GPU).forwards - RESERVE

    one = step_and_decoding(max_batched_tokens=4096)
    assert step_and_decoding(max_batched_tokens=16) == one, "one image may exceed the limit"
    step = step_and_decoding(max_batched_tokens=8192) - one
    assert step == 4608 * 16 * 3072 * 2
    assert one - step == 1024**2 * 8 * 128 * 2
    assert one - step_and_decoding(max_batched_tokens=4096, vae_tiling=True) == (1024**2 - 512**2) * 8 * 128 * 2
    assert step_and_decoding(max_batched_tokens=4096, dtype="float32") == 2 * one


def test_peaks_are_near_those_measured(dev: Sizes) -> None:
    """On one H200, docs/benchmarks.md: images of 28 steps, without what CUDA takes itself."""
    for tokens, pixels, measured_mb in ((4096, 1024, 34_083), (8 * 1024, 512, 34_140)):
        found = need(dev, settings(max_batched_tokens=tokens, prompt_cache_bytes=0), GPU).total - RESERVE
        assert found / 2**20 == pytest.approx(measured_mb, rel=0.03), pixels


def test_nothing_is_offloaded_on_a_cpu(dev: Sizes) -> None:
    assert need(dev, settings(offload="blocks"), "cpu") == need(dev, settings(), "cpu")
    assert need(dev, settings(), "cpu").weights == 2 * need(dev, settings(), GPU).weights


@pytest.mark.parametrize(
    ("gib", "capability", "changes"),
    [
        (24, None, {"dtype": "int8wo", "t5_dtype": "int8wo"}),
        (24, (8, 6), {"dtype": "int8wo", "t5_dtype": "int8wo"}),
        (24, (8, 9), {"dtype": "fp8", "t5_dtype": "int8wo"}),
        (18, None, {"dtype": "int8wo", "offload": "idle"}),
        (16, None, {"dtype": "int8wo", "offload": "idle", "vae_tiling": True}),
        (12, None, {"dtype": "int8wo", "offload": "blocks", "vae_tiling": True}),
        (2, None, None),
    ],
)
def test_advice_is_the_first_choice_that_fits(
    gib: int, capability: tuple[int, int] | None, changes: dict[str, Any] | None, dev: Sizes
) -> None:
    found = advise(dev, settings(), GPU, memory=gib * GIB, capability=capability)
    assert found == changes
    if changes:
        assert need(dev, settings(**changes), GPU).total <= gib * GIB


def test_advice_leaves_out_what_is_set_already(dev: Sizes) -> None:
    found = advise(dev, settings(dtype="int8wo"), GPU, memory=16 * GIB)
    assert found == {"offload": "idle", "vae_tiling": True}


def test_choices_take_less_and_less(dev: Sizes) -> None:
    totals = [need(dev, settings(**choice), GPU).total for choice in ({}, *CHOICES)]
    assert totals == sorted(totals, reverse=True)


def test_incomplete_configuration_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "dev"
    write_random_flux(path)
    checkpoint = FluxCheckpoint.load(path)
    assert Sizes.read(checkpoint, {}).width == 64
    config = path / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_attention_heads": "many"}))
    with pytest.raises(CheckpointError, match="incomplete"):
        Sizes.read(checkpoint, {})
