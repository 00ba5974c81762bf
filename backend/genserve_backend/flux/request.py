"""FLUX requests and results: tensors to a checked request with its defaults filled in."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from genserve_backend.errors import InvalidInput
from genserve_backend.flux.checkpoint import MAG_RATIOS_FILE, FluxCheckpoint
from genserve_backend.flux.lora.request import Lora, parse_lora
from genserve_backend.settings import CacheMethod

MAX_PROMPT_CHARACTERS = 10_000
SIZE_MULTIPLE = 16
"""Pixels: the VAE shrinks by 8 and the transformer takes patches of 2."""
PIXELS_PER_TOKEN = SIZE_MULTIPLE**2
MIN_SIZE = 64
MAX_STEPS = 100
MAX_GUIDANCE = 20.0
MIN_TRUE_CFG, MAX_TRUE_CFG, DEFAULT_TRUE_CFG = 1.0, 20.0, 4.0
MAX_CACHE = 1.0
"""Limit on the threshold of skipped steps."""
MAX_SEED = 2**63 - 1
FORMATS = ("png", "jpeg", "webp")
MAX_SIDE = {"jpeg": 65_500, "webp": 16_383}
"""Limit on the pixels per side, by file format; PNG's limit is out of reach."""
ENCODINGS = ("binary", "base64")
"""Encodings of IMAGE. A JSON caller needs base64: JSON has no bytes, and Triton corrupts text that is not UTF-8."""


@dataclass(frozen=True)
class FluxRequest:
    """A checked request for one image, with every value that determines its pixels."""

    prompt: str
    negative_prompt: str
    true_cfg_scale: float
    height: int
    width: int
    steps: int
    guidance: float
    seed: int
    format: str
    encoding: str
    max_sequence_length: int
    cache: float = 0.0
    """Threshold of skipped steps; 0 skips none."""
    cache_method: CacheMethod = "magcache"
    """Method of skipping steps, which gives the threshold its meaning."""
    lora: tuple[Lora, ...] = ()
    """Adapters, none by default."""

    @property
    def guided(self) -> bool:
        """True for true classifier-free guidance, by FluxPipeline's rule."""
        return bool(self.negative_prompt) and self.true_cfg_scale > 1

    @property
    def tokens(self) -> int:
        """Image tokens of one batch row."""
        return self.height * self.width // PIXELS_PER_TOKEN

    @property
    def batch_rows(self) -> int:
        """Batch rows of a forward: two with true classifier-free guidance."""
        return 2 if self.guided else 1

    @property
    def work(self) -> float:
        """Estimated cost: image tokens that go through the transformer if no step is skipped."""
        return self.tokens * self.batch_rows * self.steps


@dataclass(frozen=True)
class FluxResult:
    """An encoded image and its timings."""

    image: bytes
    queue_s: float
    """Seconds from its arrival at the instance to the encoding of its prompt."""
    encode_s: float
    denoise_s: float
    decode_s: float
    elapsed_time: float
    """Seconds from its arrival at the instance to its answer."""
    deadline_left_s: float
    """Seconds that were left until its deadline at the answer."""
    mean_batch_size: float
    dtype: str
    skipped_steps: int = 0


def parse(
    values: Mapping[str, Any],
    checkpoint: FluxCheckpoint,
    *,
    max_pixels: int,
    cache_method: CacheMethod = "magcache",
) -> FluxRequest:
    """Check one row of tensors and return its request.

    Args:
        values: Tensor name to str, int or float; missing ones get their default.
        checkpoint: Provides the defaults.
        max_pixels: Limit on height times width.
        cache_method: Method of skipping steps.

    Raises:
        InvalidInput: A value is out of range; the message names the tensor, the value and what is allowed.
    """
    height = _size("HEIGHT", values.get("HEIGHT", checkpoint.native_size))
    width = _size("WIDTH", values.get("WIDTH", checkpoint.native_size))
    if height * width > max_pixels:
        raise InvalidInput.of("HEIGHT x WIDTH", f"{height} x {width}", f"at most {max_pixels} pixels")
    image_format = _one_of("FORMAT", values.get("FORMAT", FORMATS[0]), FORMATS)
    max_side = MAX_SIDE.get(image_format, max_pixels)
    if max(height, width) > max_side:
        allowed = f"at most {max_side} pixels a side as {image_format}"
        raise InvalidInput.of("HEIGHT x WIDTH", f"{height} x {width}", allowed)
    seed = _within("SEED", values.get("SEED", -1), -1, MAX_SEED)
    return FluxRequest(
        prompt=_prompt("PROMPT", values.get("PROMPT", ""), minimum=1),
        negative_prompt=_prompt("NEGATIVE_PROMPT", values.get("NEGATIVE_PROMPT", ""), minimum=0),
        true_cfg_scale=_within(
            "TRUE_CFG_SCALE", values.get("TRUE_CFG_SCALE", DEFAULT_TRUE_CFG), MIN_TRUE_CFG, MAX_TRUE_CFG
        ),
        height=height,
        width=width,
        steps=_within("STEPS", values.get("STEPS", checkpoint.default_steps), 1, MAX_STEPS),
        guidance=_within("GUIDANCE", values.get("GUIDANCE", checkpoint.default_guidance), 0.0, MAX_GUIDANCE),
        # Random seeds stay below 2**32: a JSON caller may turn numbers into doubles.
        seed=secrets.randbelow(2**32) if seed == -1 else seed,
        format=image_format,
        encoding=_one_of("ENCODING", values.get("ENCODING", ENCODINGS[0]), ENCODINGS),
        max_sequence_length=checkpoint.max_sequence_length,
        cache=_cache(values.get("CACHE", 0.0), checkpoint, cache_method),
        cache_method=cache_method,
        lora=parse_lora(values.get("LORA", "[]")),
    )


def _within(tensor: str, value: Any, low: Any, high: Any) -> Any:
    if not math.isfinite(value) or not low <= value <= high:
        raise InvalidInput.of(tensor, value, f"{low} to {high}")
    return value


def _cache(value: float, checkpoint: FluxCheckpoint, method: CacheMethod) -> float:
    threshold: float = _within("CACHE", value, 0.0, MAX_CACHE)
    if threshold and method == "magcache" and not checkpoint.has_mag_ratios:
        # No other method in its place: a threshold means something else to each of them.
        raise InvalidInput.of("CACHE", value, f"0 (the checkpoint {checkpoint.name} has no {MAG_RATIOS_FILE})")
    return threshold


def _one_of(tensor: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise InvalidInput.of(tensor, value, ", ".join(allowed))
    return value


def _size(tensor: str, value: int) -> int:
    if value < MIN_SIZE or value % SIZE_MULTIPLE:
        raise InvalidInput.of(tensor, value, f"a multiple of {SIZE_MULTIPLE}, at least {MIN_SIZE}")
    return value


def _prompt(tensor: str, value: str, *, minimum: int) -> str:
    if not minimum <= len(value) <= MAX_PROMPT_CHARACTERS:
        raise InvalidInput.of(tensor, f"{len(value):,} characters long", f"{minimum} to {MAX_PROMPT_CHARACTERS:,}")
    return value
