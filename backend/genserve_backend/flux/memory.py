"""Memory that FLUX takes on a device, by its settings: arithmetic over the names and sizes of weights. No torch.

Weights are exact but for scales and padding. The memory of forwards is reckoned from the peaks on one H200 in
docs/benchmarks.md: 94,000 bytes per token of a step in bfloat16, and 1,900 bytes per pixel of a decoding.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from genserve_backend.checkpoints import CheckpointError, read_json
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.dtypes import FP8_CAPABILITY, Form, t5_form, transformer_form
from genserve_backend.settings import FluxSettings, weights_dtype

VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FORM_BYTES: dict[Form, int] = {"fp8": 1, "int8": 1, "int8wo": 1}
STEP_WIDTHS = 16
"""Values per token of a step, in widths of the transformer. Its peak: both states, queries, keys, values, and the
feed-forward's four widths before and after its activation."""
DECODE_WIDTHS = 8
"""Values per pixel of a decoding, in channels of the VAE's last block."""
DECODED_PIXELS = 1024 * 1024
"""Pixels that are decoded at a time, unless a single image has more."""
TILE_SHARE = 2
"""The native size over a tile's, see `vae_tiling`."""
RESERVE = 2**30
"""Bytes for CUDA itself, its kernels, and what the allocator loses."""
BLOCKS_ON_DEVICE = 2
"""Streamed blocks on the device: the one that runs and the next one."""

_BLOCK = re.compile(r"((?:single_)?transformer_blocks|encoder\.block)\.\d+\.")


@dataclass(frozen=True)
class Part:
    """Weights of one part of a checkpoint.

    Attributes:
        blocks: Number of values by tensor, for each block by name.
        rest: Values outside blocks.
    """

    blocks: Mapping[str, Mapping[str, int]]
    rest: int

    @classmethod
    def of(cls, tensors: Mapping[str, int]) -> Part:
        """Return a part by the number of values of each tensor, by name."""
        blocks: dict[str, Counter[str]] = {}
        rest = 0
        for name, values in tensors.items():
            if found := _BLOCK.match(name):
                blocks.setdefault(found[0], Counter())[name] += values
            else:
                rest += values
        return cls(blocks, rest)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a checkpoint.

    Attributes:
        transformer: Weights of the transformer.
        t5: Weights of the second text encoder.
        clip: Values of the first text encoder.
        vae: Values of the VAE.
        width: Width of the transformer.
        vae_width: Channels of the VAE's last block.
        native_size: Native height and width of an image, in pixels.
        text_tokens: T5 tokens of a prompt.
    """

    transformer: Part
    t5: Part
    clip: int
    vae: int
    width: int
    vae_width: int
    native_size: int
    text_tokens: int

    @classmethod
    def read(cls, checkpoint: FluxCheckpoint, tensors: Mapping[str, Mapping[str, int]]) -> Sizes:
        """Return the sizes of a checkpoint.

        Args:
            checkpoint: The checkpoint, with the configurations in its folder.
            tensors: Number of values of each tensor by part and name.

        Raises:
            CheckpointError: A configuration is missing or damaged.
        """
        transformer, vae = (read_json(checkpoint.path / part / "config.json") for part in ("transformer", "vae"))
        try:
            return cls(
                transformer=Part.of(tensors.get("transformer", {})),
                t5=Part.of(tensors.get("text_encoder_2", {})),
                clip=sum(tensors.get("text_encoder", {}).values()),
                vae=sum(tensors.get("vae", {}).values()),
                width=int(transformer["num_attention_heads"]) * int(transformer["attention_head_dim"]),
                vae_width=int(vae["block_out_channels"][0]),
                native_size=checkpoint.native_size,
                text_tokens=checkpoint.max_sequence_length,
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"a configuration in {checkpoint.path} is incomplete: {error}") from None


@dataclass(frozen=True)
class Need:
    """Bytes on the device.

    Attributes:
        weights: Weights that stay there.
        passing: Weights that are copied there for each use.
        forwards: Step, decoding and cached prompts at the limits of the settings, and the reserve.
        host: Weights in host memory.
    """

    weights: int
    passing: int
    forwards: int
    host: int

    @property
    def total(self) -> int:
        """Everything on the device at once."""
        return self.weights + self.passing + self.forwards


def need(sizes: Sizes, settings: FluxSettings, device: str) -> Need:
    """Return the memory of one instance on a device, for images of the native size.

    On a CPU, nothing is offloaded.
    """
    dtype = weights_dtype(settings.dtype, device)
    value = VALUE_BYTES[dtype]
    offload = settings.offload if device.startswith("cuda") else "none"

    def transformer_bytes(block: Mapping[str, int]) -> int:
        return _bytes(block, value, lambda layer: transformer_form(layer, settings.dtype))

    def t5_bytes(block: Mapping[str, int]) -> int:
        return _bytes(block, value, lambda layer: t5_form(layer, settings.t5_dtype))

    blocks = [transformer_bytes(block) for block in sizes.transformer.blocks.values()]
    t5_blocks = [t5_bytes(block) for block in sizes.t5.blocks.values()]
    encoders = (sizes.clip + sizes.t5.rest) * value
    idle = sum(t5_blocks) + encoders + sizes.vae * value
    weights = sum(blocks) + sizes.transformer.rest * value + idle
    passing = host = 0
    if offload != "none":
        # The encoders run between two steps, the VAE next to them.
        encoding = sizes.t5.rest * value + _passing(t5_blocks)
        passing, host = max(encoding, sizes.clip * value) + sizes.vae * value, idle
        weights -= idle
    if offload == "blocks":
        passing, host = passing + _passing(blocks), host + sum(blocks)
        weights -= sum(blocks)
    return Need(weights, passing, _forwards(sizes, settings, value), host)


def flux_1_dev() -> Sizes:
    """Return the sizes of FLUX.1-dev, by its published configurations."""
    width, t5_width, t5_inner = 3072, 4096, 10240
    square = width**2
    double = {"norm1.linear.weight": 12 * square, "ff.net.0.proj.weight": 24 * square, "biases": 30 * width + 4 * 128}
    single = {"norm.linear.weight": 3 * square, "proj_mlp.weight": 12 * square, "biases": 11 * width + 2 * 128}
    t5 = {"layer.1.DenseReluDense.wo.weight": 4 * t5_width**2 + 3 * t5_width * t5_inner, "norms": 2 * t5_width}
    tensors = {
        **{f"transformer_blocks.{index}.{name}": size for index in range(19) for name, size in double.items()},
        **{f"single_transformer_blocks.{index}.{name}": size for index in range(38) for name, size in single.items()},
        # Embedders of latents, prompts, time, guidance and pooled prompts; the last modulation and projection.
        "embedders": (65 + 4097 + 2 * 257 + 769) * width + 3 * (square + width),
        "last": 2 * (square + width) + 64 * (width + 1),
    }
    t5_tensors = {f"encoder.block.{index}.{name}": size for index in range(24) for name, size in t5.items()}
    t5_rest = {"shared": 32_128 * t5_width + t5_width, "encoder.block.0.positions": 32 * 64}
    return Sizes(
        transformer=Part.of(tensors),
        t5=Part.of({**t5_tensors, **t5_rest}),
        clip=123_060_480,
        vae=83_819_683,
        width=width,
        vae_width=128,
        native_size=1024,
        text_tokens=512,
    )


CHOICES: tuple[Mapping[str, Any], ...] = (
    {"t5_dtype": "int8wo"},
    {"offload": "idle"},
    {"dtype": "int8wo", "t5_dtype": "int8wo"},
    {"dtype": "int8wo", "offload": "idle"},
    {"dtype": "int8wo", "offload": "idle", "vae_tiling": True},
    {"dtype": "int8wo", "offload": "blocks", "vae_tiling": True},
)
"""Settings that save memory, those that cost least first. fp8 takes as much as int8wo, and is faster where it runs."""


def advise(
    sizes: Sizes, settings: FluxSettings, device: str, *, memory: float, capability: tuple[int, int] | None = None
) -> Mapping[str, Any] | None:
    """Return the first of `CHOICES` with which everything fits into the memory.

    Args:
        sizes: The checkpoint.
        settings: The settings to start from.
        device: The device in torch's notation.
        memory: Bytes for one instance.
        capability: The GPU's compute capability, if it is known: fp8 takes int8wo's place where it can run.

    Returns:
        Fields of `FluxSettings` to change, or None if nothing fits.
    """
    for choice in CHOICES:
        changed = dict(choice)
        if "dtype" in changed and capability is not None and capability >= FP8_CAPABILITY:
            changed["dtype"] = "fp8"
        changed = {name: value for name, value in changed.items() if getattr(settings, name) != value}
        merged = settings.model_copy(update=changed)
        if changed and need(sizes, merged, device).total <= memory:
            return changed
    return None


def _bytes(block: Mapping[str, int], value: int, form_of: Callable[[str], Form | None]) -> int:
    """Return the bytes of a block whose layers have these forms, and `value` bytes per value elsewhere."""
    total = 0
    for name, values in block.items():
        layer, _, kind = name.rpartition(".")
        form = form_of(layer) if kind == "weight" and not _is_norm(layer) else None
        total += values * (FORM_BYTES[form] if form else value)
    return total


def _is_norm(layer: str) -> bool:
    """Return whether a layer is a norm with weights of its own, or T5's table of positions: none is a matrix."""
    last = layer.rpartition(".")[2]
    return last.startswith("norm") or last in {"layer_norm", "relative_attention_bias"}


def _passing(blocks: list[int]) -> int:
    return sum(sorted(blocks)[-BLOCKS_ON_DEVICE:])


def _forwards(sizes: Sizes, settings: FluxSettings, value: int) -> int:
    native_tokens = (sizes.native_size // 16) ** 2
    image_tokens = max(settings.max_batched_tokens, native_tokens)
    rows = -(-image_tokens // native_tokens)
    step = (image_tokens + rows * sizes.text_tokens) * STEP_WIDTHS * sizes.width * value
    pixels = max(DECODED_PIXELS, sizes.native_size**2)
    if settings.vae_tiling:
        pixels = (sizes.native_size // TILE_SHARE) ** 2
    decoding = pixels * DECODE_WIDTHS * sizes.vae_width * value
    return step + decoding + settings.prompt_cache_bytes + RESERVE
