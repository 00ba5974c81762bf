"""The shipped FLUX: its size, and the accuracy of its images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy", reason="the detection needs the demo extra")
pytest.importorskip("peft", reason="the LoRA needs the demo extra")
import torch
from diffusers import FluxPipeline
from PIL import Image, ImageChops
from safetensors import safe_open

from evaluate_flux import Sampling, evaluate, prompts
from shapes.captions import NEON
from shapes.detection import detect

DEMO = Path(__file__).resolve().parents[2] / "demo"
CHECKPOINT = DEMO / "flux"
LORA = DEMO / "neon_lora"
PROMPT = "a large red circle on a blue background"


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def pipeline() -> Any:
    pipeline = FluxPipeline.from_pretrained(CHECKPOINT, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, prompt: str = PROMPT, *, seed: int = 1, **options: Any) -> Image.Image:
    image: Image.Image = pipeline(
        prompt,
        **{"height": 128, "width": 128, "num_inference_steps": 20, "max_sequence_length": 32, **options},
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    return image


def test_files_are_small_enough_for_the_repository() -> None:
    assert size(CHECKPOINT) < 25_000_000
    assert size(LORA) < 1_000_000


def test_held_out_prompts_are_drawn_right(pipeline: Any) -> None:
    found = evaluate(pipeline, prompts(48, seed=1), Sampling())
    share = {aspect: sum(right) / len(right) for aspect, right in found.items()}
    # Slightly below the minimum of demo/evaluate_flux.py, which takes 600 images.
    assert share["background"] >= 0.9
    assert share["colour"] >= 0.85
    assert share["shape"] >= 0.8
    assert share["relation"] >= 0.6


@pytest.mark.parametrize(("width", "height"), [(64, 64), (256, 256), (96, 160), (192, 128)])
def test_other_sizes_show_the_prompt(pipeline: Any, width: int, height: int) -> None:
    image = draw(pipeline, width=width, height=height)
    assert image.size == (width, height)
    detection = detect(image)
    assert detection.background == "blue"
    assert detection.things[0].colour == "red"


def test_guidance_changes_the_image(pipeline: Any) -> None:
    weak, strong = draw(pipeline, guidance_scale=1.0), draw(pipeline, guidance_scale=6.0)
    assert ImageChops.difference(weak, strong).getbbox() is not None


def test_unknown_words_still_give_an_image(pipeline: Any) -> None:
    assert (
        len(draw(pipeline, "\u4e00\u53ea\u732b, a lighthouse in the rain", num_inference_steps=4).getcolors(1 << 15))
        > 1
    )


def test_lora_draws_neon_outlines(pipeline: Any) -> None:
    with safe_open(LORA / "pytorch_lora_weights.safetensors", "pt") as file:
        assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in file.keys())  # noqa: SIM118
    prompt = f"a large green square, {NEON}"
    pipeline.load_lora_weights(LORA)
    try:
        neon = draw(pipeline, prompt)
    finally:
        pipeline.unload_lora_weights()
    assert detect(neon).background == "black"
    inside = neon.resize((8, 8), Image.Resampling.BOX).crop((3, 3, 5, 5)).convert("L")
    assert inside.getextrema()[1] < 90, "an outline is dark inside"
