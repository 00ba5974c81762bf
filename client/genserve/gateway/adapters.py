"""LoRA adapters in requests for images."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
MAX_ADAPTERS = 8
"""The limit of the servers behind the gateway."""


class Adapter(BaseModel):
    """LoRA adapter; its name alone stands for it with weight 1."""

    model_config = STRICT

    name: Annotated[str, Field(min_length=1)]
    weight: float = 1.0

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given


def _listed(given: Any) -> Any:
    """Return one adapter, or weights by name, as a list; anything else as it is."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, dict):
        is_adapter = isinstance(given.get("name"), str)
        return [given] if is_adapter else [{"name": name, "weight": weight} for name, weight in given.items()]
    return given


Adapters = Annotated[list[Adapter], Field(max_length=MAX_ADAPTERS), BeforeValidator(_listed)]
"""Adapters in every form that the client takes, as a list."""


def lora_argument(adapters: list[Adapter] | None) -> list[dict[str, Any]]:
    """Return the argument `lora` of the client."""
    return [adapter.model_dump() for adapter in adapters or ()]
