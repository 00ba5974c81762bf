"""FLUX requests: ranges, defaults and errors."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genserve_backend.errors import InvalidInput
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.request import FluxRequest, parse

MAX_PIXELS = 2048 * 2048
DEV = FluxCheckpoint(Path("/dev-model"), "dev", native_size=1024, guidance_embeds=True, max_sequence_length=512)
SCHNELL = FluxCheckpoint(Path("/schnell"), "schnell", native_size=512, guidance_embeds=False, max_sequence_length=256)


def flux(checkpoint: FluxCheckpoint = DEV, max_pixels: int = MAX_PIXELS, **values: Any) -> FluxRequest:
    return parse({"PROMPT": "a cat", **values}, checkpoint, max_pixels=max_pixels)


def rejection(**values: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        flux(**values)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 200
    return message


@pytest.mark.parametrize(
    ("checkpoint", "size", "steps", "guidance", "tokens"),
    [(DEV, 1024, 28, 3.5, 512), (SCHNELL, 512, 4, 0.0, 256)],
    ids=["dev", "schnell"],
)
def test_checkpoint_provides_the_defaults(
    checkpoint: FluxCheckpoint, size: int, steps: int, guidance: float, tokens: int
) -> None:
    request = flux(checkpoint, SEED=7)
    assert (request.height, request.width) == (size, size)
    assert (request.steps, request.guidance, request.max_sequence_length) == (steps, guidance, tokens)
    assert (request.prompt, request.negative_prompt, request.true_cfg_scale) == ("a cat", "", 4.0)
    assert (request.format, request.encoding, request.seed) == ("png", "binary", 7)


def test_given_values_are_used() -> None:
    values: dict[str, Any] = {
        "NEGATIVE_PROMPT": "dogs",
        "TRUE_CFG_SCALE": 2.5,
        "HEIGHT": 64,
        "WIDTH": 128,
        "STEPS": 3,
        "GUIDANCE": 1.5,
    }
    request = flux(**values, SEED=11, FORMAT="webp")
    assert (request.negative_prompt, request.true_cfg_scale, request.height, request.width) == ("dogs", 2.5, 64, 128)
    assert (request.steps, request.guidance, request.seed, request.format) == (3, 1.5, 11, "webp")


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("STEPS", 1),
        ("STEPS", 100),
        ("GUIDANCE", 0.0),
        ("GUIDANCE", 20.0),
        ("TRUE_CFG_SCALE", 1.0),
        ("TRUE_CFG_SCALE", 20.0),
        ("CACHE", 0.0),
        ("CACHE", 1e-30),
        ("CACHE", 1.0),
        ("SEED", 0),
        ("SEED", 2**63 - 1),
        ("HEIGHT", 64),
        ("WIDTH", 64),
        ("HEIGHT", 4096),
        ("FORMAT", "png"),
        ("FORMAT", "jpeg"),
        ("FORMAT", "webp"),
        ("ENCODING", "binary"),
        ("ENCODING", "base64"),
        ("PROMPT", "x"),
        ("PROMPT", "x" * 10_000),
        ("PROMPT", "\U0001f43c" * 10_000),
        ("NEGATIVE_PROMPT", ""),
        ("NEGATIVE_PROMPT", "x" * 10_000),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else repr(value)[:20],
)
def test_limits_are_inclusive(tensor: str, value: Any) -> None:
    assert getattr(flux(**{tensor: value}), tensor.lower()) == value


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("STEPS", 0, "STEPS is 0; allowed: 1 to 100"),
        ("STEPS", 101, "STEPS is 101; allowed: 1 to 100"),
        ("STEPS", -(2**31), "STEPS is -2147483648; allowed: 1 to 100"),
        ("GUIDANCE", -0.1, "GUIDANCE is -0.1; allowed: 0.0 to 20.0"),
        ("GUIDANCE", 20.5, "GUIDANCE is 20.5; allowed: 0.0 to 20.0"),
        ("GUIDANCE", math.nan, "GUIDANCE is nan; allowed: 0.0 to 20.0"),
        ("GUIDANCE", math.inf, "GUIDANCE is inf; allowed: 0.0 to 20.0"),
        ("TRUE_CFG_SCALE", 0.5, "TRUE_CFG_SCALE is 0.5; allowed: 1.0 to 20.0"),
        ("TRUE_CFG_SCALE", 20.5, "TRUE_CFG_SCALE is 20.5; allowed: 1.0 to 20.0"),
        ("TRUE_CFG_SCALE", math.nan, "TRUE_CFG_SCALE is nan; allowed: 1.0 to 20.0"),
        ("TRUE_CFG_SCALE", -math.inf, "TRUE_CFG_SCALE is -inf; allowed: 1.0 to 20.0"),
        ("CACHE", -0.1, "CACHE is -0.1; allowed: 0.0 to 1.0"),
        ("CACHE", 1.5, "CACHE is 1.5; allowed: 0.0 to 1.0"),
        ("CACHE", 3.4e38, "CACHE is 3.4e+38; allowed: 0.0 to 1.0"),
        ("CACHE", math.nan, "CACHE is nan; allowed: 0.0 to 1.0"),
        ("CACHE", math.inf, "CACHE is inf; allowed: 0.0 to 1.0"),
        ("CACHE", -math.inf, "CACHE is -inf; allowed: 0.0 to 1.0"),
        ("SEED", -2, f"SEED is -2; allowed: -1 to {2**63 - 1}"),
        ("HEIGHT", 48, "HEIGHT is 48; allowed: a multiple of 16, at least 64"),
        ("HEIGHT", 72, "HEIGHT is 72; allowed: a multiple of 16, at least 64"),
        ("WIDTH", 0, "WIDTH is 0; allowed: a multiple of 16, at least 64"),
        ("WIDTH", -64, "WIDTH is -64; allowed: a multiple of 16, at least 64"),
        ("WIDTH", 65, "WIDTH is 65; allowed: a multiple of 16, at least 64"),
        ("FORMAT", "gif", "FORMAT is gif; allowed: png, jpeg, webp"),
        ("FORMAT", "PNG", "FORMAT is PNG; allowed: png, jpeg, webp"),
        ("FORMAT", "", "FORMAT is ; allowed: png, jpeg, webp"),
        ("ENCODING", "hex", "ENCODING is hex; allowed: binary, base64"),
        ("PROMPT", "", "PROMPT is 0 characters long; allowed: 1 to 10,000"),
        ("PROMPT", "x" * 10_001, "PROMPT is 10,001 characters long; allowed: 1 to 10,000"),
        ("NEGATIVE_PROMPT", "x" * 10_001, "NEGATIVE_PROMPT is 10,001 characters long; allowed: 0 to 10,000"),
    ],
    ids=lambda value: value.partition(";")[0] if isinstance(value, str) and " is " in value else "",
)
def test_error_names_tensor_value_and_range(tensor: str, value: Any, message: str) -> None:
    assert rejection(**{tensor: value}) == message


def test_next_float32_beyond_the_limit_is_rejected() -> None:
    beyond = np.nextafter(np.float32(20), np.float32(21)).item()
    assert rejection(GUIDANCE=beyond).startswith("GUIDANCE is 20.00000")
    assert rejection(TRUE_CFG_SCALE=beyond).startswith("TRUE_CFG_SCALE is 20.00000")


def test_cache_is_off_by_default() -> None:
    assert flux().cache == 0.0
    assert flux(SCHNELL).cache == 0.0


def test_cache_needs_ratios_or_the_first_block() -> None:
    allowed = r"CACHE is 0\.1; allowed: 0 \(the checkpoint schnell has no mag_ratios\.json\)"
    with pytest.raises(InvalidInput, match=allowed):
        flux(SCHNELL, CACHE=0.1)
    assert flux(SCHNELL, CACHE=0.0).cache == 0.0
    assert flux(replace(SCHNELL, mag_ratios=(1.0, 1.1)), CACHE=0.1).cache == 0.1
    request = parse({"PROMPT": "a cat", "CACHE": 0.1}, SCHNELL, max_pixels=MAX_PIXELS, cache_method="first-block")
    assert (request.cache, request.cache_method) == (0.1, "first-block")


def test_missing_prompt_is_empty() -> None:
    with pytest.raises(InvalidInput, match="PROMPT is 0 characters long"):
        parse({}, DEV, max_pixels=MAX_PIXELS)


@pytest.mark.parametrize(
    ("height", "width", "fits"),
    [
        (512, 512, True),
        (1024, 256, True),
        (512, 528, False),
        (64, 4096, True),
        (64, 4112, False),
        (2**30, 2**30, False),
    ],
    ids=str,
)
def test_pixel_limit_is_height_times_width(height: int, width: int, fits: bool) -> None:
    values: dict[str, Any] = {"HEIGHT": height, "WIDTH": width, "max_pixels": 512 * 512}
    if fits:
        assert flux(**values).width == width
    else:
        assert rejection(**values) == f"HEIGHT x WIDTH is {height} x {width}; allowed: at most 262144 pixels"


@pytest.mark.parametrize(
    ("image_format", "side", "fits"),
    [
        ("png", 65_536, True),
        ("jpeg", 65_488, True),
        ("jpeg", 65_504, False),
        ("webp", 16_368, True),
        ("webp", 16_384, False),
    ],
    ids=str,
)
def test_sides_fit_the_file_format(image_format: str, side: int, fits: bool) -> None:
    if fits:
        assert flux(FORMAT=image_format, HEIGHT=64, WIDTH=side).width == side
        assert flux(FORMAT=image_format, HEIGHT=side, WIDTH=64).height == side
    else:
        message = rejection(FORMAT=image_format, HEIGHT=side, WIDTH=64)
        assert message.startswith(f"HEIGHT x WIDTH is {side} x 64; allowed: at most ")
        assert message.endswith(f"pixels a side as {image_format}")


def test_adapters_are_parsed() -> None:
    assert flux().lora == ()
    assert flux(LORA='[{"name": "neon", "weight": 0.5}]').lora == (("neon", 0.5),)
    assert rejection(LORA="[1]").startswith("LORA is a list with 1; allowed: a JSON list")


def test_error_for_a_hostile_format_is_short() -> None:
    assert rejection(FORMAT="png\n" * 100_000).endswith("...; allowed: png, jpeg, webp")


@pytest.mark.parametrize("values", [{}, {"SEED": -1}], ids=["missing", "minus-one"])
def test_missing_seed_is_random(values: dict[str, Any]) -> None:
    seeds = {flux(**values).seed for _ in range(200)}
    assert len(seeds) > 190
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert max(seeds) > 2**31 > min(seeds)
