"""The shipped FLUX: its size, and the accuracy of its images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
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
LORAS = DEMO / "loras"
STYLES = ("neon", "blueprint")
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
    assert size(LORAS) < 1_000_000


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


@pytest.fixture
def adapted(pipeline: Any) -> Iterator[Callable[..., Image.Image]]:
    """Return a function that draws with adapters, given as names with weights."""
    for style in STYLES:
        pipeline.load_lora_weights(LORAS / style, adapter_name=style)

    def drawn(prompt: str, **weights: float) -> Image.Image:
        pipeline.set_adapters(list(weights), list(weights.values()))
        return draw(pipeline, prompt)

    yield drawn
    pipeline.unload_lora_weights()


def middle(image: Image.Image) -> np.ndarray:
    """Return the mean colour of the middle, red, green and blue."""
    pixels: np.ndarray = np.asarray(image)[56:72, 56:72].mean(axis=(0, 1))
    return pixels


@pytest.mark.parametrize("style", STYLES)
def test_lora_files_have_only_low_rank_matrices(style: str) -> None:
    with safe_open(LORAS / style / "pytorch_lora_weights.safetensors", "pt") as file:
        assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("prompt", [f"a large green square, {NEON}", "a large green square"], ids=["named", "plain"])
def test_lora_draws_neon_outlines(prompt: str, adapted: Callable[..., Image.Image]) -> None:
    neon = adapted(prompt, neon=1.0)
    assert detect(neon).background == "black"
    assert middle(neon).max() < 90, "an outline is dark inside"
    assert np.asarray(neon)[..., 1].max() > 150, "and green itself"


@pytest.mark.parametrize("prompt", ["a large green square", "a large black square on a yellow background"])
def test_lora_draws_blueprints(prompt: str, adapted: Callable[..., Image.Image]) -> None:
    pixels = np.asarray(adapted(prompt, blueprint=1.0)).astype(int)
    red, green, blue = middle(adapted(prompt, blueprint=1.0))
    assert blue > red + 60
    assert blue > green + 30, "the paper is blue inside of the outline"
    assert (pixels.min(axis=-1) > 190).mean() > 0.02, "the outline is white"


def test_both_loras_together_are_outlines_on_blue(adapted: Callable[..., Image.Image]) -> None:
    mixed, blueprint = (adapted("a large red square", blueprint=0.6, **more) for more in ({"neon": 0.6}, {}))
    red, _, blue = middle(mixed)
    assert blue > red + 60
    assert np.asarray(mixed)[..., 0].max() > 150, "the outline is bright"
    assert ImageChops.difference(mixed, blueprint).getbbox(), "neon has its share"
