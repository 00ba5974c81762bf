"""The variants of an engine: one entry each. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any


def compile_blocks(pipeline: Any) -> None:
    """Have torch.compile take the transformer's blocks, one by one, for all sizes at once."""
    pipeline.transformer.compile_repeated_blocks(dynamic=True)


def compile_blocks_by_size(pipeline: Any) -> None:
    """Have torch.compile take the transformer's blocks, one by one, anew for each number of rows and tokens."""
    pipeline.transformer.compile_repeated_blocks(dynamic=False)


@dataclass(frozen=True)
class Variant:
    """A way to build an engine."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the engine."""
    instead: Callable[[Any], None] | None = None
    """Done to FLUX's pipeline, before the engine gets it, where the engine does not have these settings."""

    def prepare(self, known: Container[str], pipeline: Any = None) -> dict[str, Any]:
        """Return the settings, or do what stands in for them.

        Args:
            known: The names of the settings that the engine has.
            pipeline: FLUX's, before the engine gets it.

        Raises:
            ValueError: The engine has no such setting, and nothing stands in for it.
        """
        missing = [name for name in self.settings if name not in known]
        if self.instead and (missing or not self.settings):
            self.instead(pipeline)
            return {}
        if missing:
            raise ValueError(f"the engine has no setting {', '.join(missing)}")
        return dict(self.settings)


FLUX_VARIANTS: dict[str, Variant] = {
    "eager": Variant(),
    "compile": Variant({"compiled": True}, instead=compile_blocks),
    "compile-by-size": Variant(instead=compile_blocks_by_size),
}
RERANK_VARIANTS: dict[str, Variant] = {
    "eager": Variant(),
    "compile": Variant({"compiled": True}),
}
USUAL = ("eager", "compile")
"""Measured where a caller names none."""
