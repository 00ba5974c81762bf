"""Scales of low-rank products: alpha over rank, layer by layer as diffusers and PEFT find them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from genserve_backend.errors import shorten
from genserve_backend.flux.lora.folder import AdapterError
from genserve_backend.flux.lora.key_formats import Factors

UNSUPPORTED_OPTIONS = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
)
"""Options of PEFT's ``LoraConfig`` for more than plain low-rank products."""
PLAIN_PATTERN = re.compile(r"\^?[\w.-]+")
"""Patterns without the syntax of regular expressions, apart from ``^`` and the dots in names."""

Value = TypeVar("Value")


class Scales:
    """Scales of the products of one part.

    Args:
        factors: The products.

    Raises:
        AdapterError: The metadata are damaged, or ask for something unsupported.
    """

    def __init__(self, factors: Factors) -> None:
        metadata = factors.metadata or {}
        for option in UNSUPPORTED_OPTIONS:
            if metadata.get(option):
                raise AdapterError(f"its metadata ask for {option}, which is not supported")
        if metadata.get("bias", "none") != "none":
            raise AdapterError("its metadata ask for biases, which are not supported")
        self._metadata = metadata
        self._ranks = _patterns(metadata, "rank_pattern")
        self._alphas = _patterns(metadata, "alpha_pattern")
        # PEFT has one alpha for all layers, and patterns for the exceptions. diffusers takes the first one.
        given = {key.removesuffix(".alpha"): float(alpha.item()) for key, alpha in factors.alphas.items()}
        self._usual = next(iter(given.values()), None)
        self._exceptions = {layer: alpha for layer, alpha in given.items() if alpha != self._usual}

    def of(self, layer: str, rank: int) -> float:
        """Return the factor of a layer's product.

        Raises:
            AdapterError: The metadata contradict the rank, or have no number for alpha.
        """
        if self._metadata:
            return self._configured(layer, rank)
        return 1.0 if self._usual is None else _match(self._exceptions, layer, self._usual) / rank

    def _configured(self, layer: str, rank: int) -> float:
        """Return the factor by PEFT's ``LoraConfig``, whose default is 8 for both numbers."""
        wanted = _match(self._ranks, layer, self._metadata.get("r", 8))
        alpha = _match(self._alphas, layer, self._metadata.get("lora_alpha", 8))
        if wanted != rank:
            raise AdapterError(f"its layer {shorten(layer)} has rank {rank}, but its metadata say {shorten(wanted)}")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise AdapterError(f"its metadata have the alpha {shorten(alpha)}")
        return alpha / (math.sqrt(rank) if self._metadata.get("use_rslora") else rank)


def _patterns(metadata: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    patterns = metadata.get(name) or {}
    if not isinstance(patterns, dict) or not all(PLAIN_PATTERN.fullmatch(pattern) for pattern in patterns):
        raise AdapterError(f"its metadata have a {name} that is not supported")
    return patterns


def _match(patterns: Mapping[str, Value], layer: str, default: Value) -> Value:
    """Return the value of the first pattern that PEFT would match with a layer: its name, or the end of its name."""
    for pattern, value in patterns.items():
        if pattern.removeprefix("^") == layer or layer.endswith(f".{pattern}"):
            return value
    return default
