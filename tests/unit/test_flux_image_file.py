"""Image files: pixels, and settings in the metadata."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.image_file import embedded_settings, encode, generation_settings
from genserve_backend.flux.request import FORMATS, FluxRequest, parse

CHECKPOINT = FluxCheckpoint(Path("/m"), "tiny", native_size=64, guidance_embeds=True, max_sequence_length=64)
PROMPTS = {
    "plain": "a red circle",
    "chinese": "\u4e00\u53ea\u732b\u5728\u6c99\u53d1\u4e0a",
    "emoji": "\U0001f469\u200d\U0001f680 party",
    "quotes": "say \"no\" and 'yes' \\ {}",
    "lines": "two\nlines\tand\ttabs",
    "nul": "before\x00after",
    "right-to-left": "\u202eabc \u05e9\u05dc\u05d5\u05dd",
}

formats = pytest.mark.parametrize("image_format", FORMATS)


def request(image_format: str = "png", **values: Any) -> FluxRequest:
    given = {"PROMPT": "a cat", "SEED": 2**63 - 1, "HEIGHT": 64, "WIDTH": 96, "FORMAT": image_format, **values}
    return parse(given, CHECKPOINT, max_pixels=2**20)


def settings_of(flux: FluxRequest) -> dict[str, Any]:
    return generation_settings(flux, model="tiny", dtype="bfloat16")


def noise(flux: FluxRequest) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (flux.height, flux.width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def file_of(flux: FluxRequest) -> bytes:
    return encode(noise(flux), flux, settings_of(flux))


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@formats
def test_file_has_the_requested_format_and_size(image_format: str) -> None:
    image = opened(file_of(request(image_format)))
    assert (image.format, image.size, image.mode) == (image_format.upper(), (96, 64), "RGB")


def test_png_is_lossless() -> None:
    flux = request("png")
    assert np.array_equal(np.asarray(opened(file_of(flux))), np.asarray(noise(flux)))


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_lossy_formats_stay_close(image_format: str) -> None:
    flux = request(image_format)
    gradient = Image.linear_gradient("L").resize((flux.width, flux.height)).convert("RGB")
    decoded = np.asarray(opened(encode(gradient, flux, settings_of(flux))), dtype=np.int16)
    assert np.abs(decoded - np.asarray(gradient, dtype=np.int16)).max() <= 12


@formats
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_settings_survive_in_the_file(prompt: str, image_format: str) -> None:
    flux = request(image_format, PROMPT=prompt, NEGATIVE_PROMPT=prompt * 2, GUIDANCE=1.1, STEPS=3)
    found = embedded_settings(opened(file_of(flux)))
    assert found == {"prompt": prompt, "negative_prompt": prompt * 2, **settings_of(flux)}
    assert found["seed"] == 2**63 - 1


@formats
def test_file_has_every_setting_of_the_contract(image_format: str) -> None:
    found = embedded_settings(opened(file_of(request(image_format))))
    wanted = {"height", "width", "steps", "guidance", "true_cfg_scale", "max_sequence_length", "dtype", "model", "seed"}
    assert found.keys() >= wanted


@formats
@pytest.mark.parametrize("prompt", ["\U0001f43c" * 10_000, "x" * 10_000], ids=["emoji", "ascii"])
def test_longest_prompts_encode(prompt: str, image_format: str) -> None:
    flux = request(image_format, PROMPT=prompt, NEGATIVE_PROMPT=prompt)
    image = opened(file_of(flux))
    found = embedded_settings(image)
    assert image.size == (96, 64)
    assert {name: found[name] for name in settings_of(flux)} == settings_of(flux)
    whole = image_format == "png" or prompt.isascii()
    assert ("prompt" in found) == whole
    assert not whole or found["prompt"] == found["negative_prompt"] == prompt


@formats
def test_same_request_gives_the_same_bytes(image_format: str) -> None:
    flux = request(image_format)
    assert file_of(flux) == file_of(replace(flux))
    assert file_of(flux) != file_of(replace(flux, seed=1))


@formats
def test_cache_is_told_only_if_it_is_used(image_format: str) -> None:
    told = embedded_settings(opened(file_of(request(image_format, CACHE=0.25))))
    assert told.items() >= {"cache": 0.25, "cache_method": "magcache"}.items()
    assert "cache" not in embedded_settings(opened(file_of(request(image_format))))


@formats
def test_foreign_image_has_no_settings(image_format: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, image_format.upper())
    assert embedded_settings(opened(buffer.getvalue())) == {}


@pytest.mark.parametrize(("image_format", "side"), [("jpeg", 65_488), ("webp", 16_368)], ids=["jpeg", "webp"])
def test_longest_side_encodes(image_format: str, side: int) -> None:
    flux = parse({"PROMPT": "x", "HEIGHT": 64, "WIDTH": side, "FORMAT": image_format}, CHECKPOINT, max_pixels=2**23)
    data = encode(Image.new("RGB", (flux.width, flux.height)), flux, settings_of(flux))
    assert Image.open(io.BytesIO(data)).size == (side, 64)
