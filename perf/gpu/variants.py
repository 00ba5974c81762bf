"""Variants of the engines, one entry each. Does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any


def compile_blocks_by_size(pipeline: Any) -> None:
    """Compile the transformer's blocks one by one, for each number of rows and tokens."""
    pipeline.transformer.compile_repeated_blocks(dynamic=False)


@dataclass(frozen=True)
class Variant:
    """One configuration of an engine."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the engine."""
    instead: Callable[[Any], None] | None = None
    """Fallback if the engine lacks these settings: a change to FLUX's pipeline before the engine is built."""

    def prepare(self, supported: Container[str], pipeline: Any = None) -> dict[str, Any]:
        """Return the settings, or apply the fallback and return those that the engine has.

        Args:
            supported: Names of the engine's settings.
            pipeline: FLUX's pipeline, before the engine is built.

        Raises:
            ValueError: The engine lacks a setting, and there is no fallback.
        """
        missing = [name for name in self.settings if name not in supported]
        if self.instead and (missing or not self.settings):
            self.instead(pipeline)
            return {name: value for name, value in self.settings.items() if name in supported}
        if missing:
            raise ValueError(f"the engine has no setting {', '.join(missing)}")
        return dict(self.settings)


FLUX_VARIANTS: dict[str, Variant] = {
    "eager": Variant(),
    "compile": Variant({"compiled": True}),
    "compile-by-size": Variant(instead=compile_blocks_by_size),
    "fp8": Variant({"dtype": "fp8"}),
    "fp8-compile": Variant({"dtype": "fp8", "compiled": True}),
}
RERANK_VARIANTS: dict[str, Variant] = {
    "eager": Variant({"compiled": False}),
    "compile": Variant({"compiled": True}),
}
USUAL = ("eager", "compile")
"""Variants measured by default."""
