"""The training of the demo's FLUX: every stage for a few steps, and resuming."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft", reason="training needs the demo extra")
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file
from torch import nn

from training.flow import draw_sigmas
from training.lora import PLANS
from training.stage import Session, Stage

DEMO = Path(__file__).resolve().parents[2] / "demo"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a smoke run."""
    folder = tmp_path_factory.mktemp("train")
    run("train_flux.py", "--work", folder / "work", "--flux", folder / "flux", "--loras", folder / "loras")
    return folder


def run(script: str, *options: str | Path) -> None:
    command = [sys.executable, str(DEMO / script), "--smoke", "--device", "cpu", *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]


def generate(pipeline: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    image = pipeline("a circle", height=128, width=128, num_inference_steps=2, generator=generator, output_type="np")
    return np.asarray(image.images[0])


@pytest.mark.parametrize("style", PLANS)
def test_smoke_run_writes_a_checkpoint_and_loras_that_diffusers_loads(style: str, trained: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(trained / "flux")  # without a dtype, the common case
    pipeline.set_progress_bar_config(disable=True)
    plain = generate(pipeline)
    assert plain.shape == (128, 128, 3)
    assert np.isfinite(plain).all()
    pipeline.load_lora_weights(trained / "loras" / style)
    adapted = pipeline.transformer.state_dict()
    assert any("lora_A" in name for name in adapted)


def test_lora_of_a_finished_checkpoint_is_trained_alone(trained: Path, tmp_path: Path) -> None:
    run("train_lora.py", "blueprint", "--work", tmp_path, "--flux", trained / "flux", "--output", tmp_path / "new")
    weights = load_file(tmp_path / "new" / "pytorch_lora_weights.safetensors")
    assert {name.rsplit(".", 2)[1] for name in weights} == {"lora_A", "lora_B"}
    assert all(torch.isfinite(weight).all() for weight in weights.values())


@pytest.mark.parametrize("stage", ["autoencoder", "text", "flow", "guidance", "lora-neon", "lora-blueprint"])
def test_stage_writes_a_checkpoint(trained: Path, stage: str) -> None:
    state = torch.load(trained / "work" / stage / "checkpoint.pt", weights_only=True)
    assert state["step"] > 0
    assert all(torch.isfinite(weight).all() for weight in state["averaged"].values() if weight.is_floating_point())


@pytest.mark.parametrize("stage", ["flow", "guidance", "lora-neon", "lora-blueprint"])
def test_image_stages_write_a_sample_grid(trained: Path, stage: str) -> None:
    assert len(list((trained / "work" / stage / "samples").glob("*.png"))) == 1


class Interrupted(Exception):
    pass


def toy(work: Path, *, stop_at: int | None = None) -> nn.Module:
    """Train a stage that fits noise; stop before a step."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    stage = Stage("toy", Session(work), model, [optimizer], steps=40, warmup=5, save_every=10)
    for step in stage:
        if step == stop_at:
            raise Interrupted
        target = torch.randn(4, generator=stage.generator) + stage.rng.random()
        stage.optimize((model(torch.ones(4)) - target).square().mean())
    return stage.averaged.module


def test_interrupted_stage_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = toy(tmp_path / "whole")
    with pytest.raises(Interrupted):
        toy(tmp_path / "parts", stop_at=25)
    resumed = toy(tmp_path / "parts")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name])
    lines = (tmp_path / "whole" / "toy" / "losses.csv").read_text().splitlines()
    assert lines[0] == "step,loss"
    assert [line.partition(",")[0] for line in lines[1:]] == ["20", "40"]


def test_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    first = toy(tmp_path)
    before = (tmp_path / "toy" / "checkpoint.pt").stat().st_mtime_ns
    assert torch.equal(toy(tmp_path).weight, first.weight)
    assert (tmp_path / "toy" / "checkpoint.pt").stat().st_mtime_ns == before


def test_sigmas_shift_towards_noise_for_larger_images() -> None:
    small, large = (draw_sigmas(4000, tokens, torch.Generator().manual_seed(0)) for tokens in (64, 4096))
    assert 0 < small.min() < small.max() < 1
    assert 0.5 < small.mean() < large.mean()
