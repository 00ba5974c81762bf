"""The tensor LORA: JSON to checked names and weights. Does not import torch."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from genserve_backend.errors import InvalidInput

MAX_LORA_CHARACTERS = 4_096
MAX_ADAPTERS = 8
"""Adapters of one image."""
MAX_NAME_BYTES = 200
"""Limit on a name in UTF-8; with its suffix it has to be a file name."""
MAX_WEIGHT = 10.0
FORM = 'a JSON list of {"name": string, "weight": number}'


class Lora(NamedTuple):
    """An adapter that a request names."""

    name: str
    weight: float
    """Factor of the adapter's change, -10 to 10; 1 is its training."""


def parse_lora(text: str) -> tuple[Lora, ...]:
    """Return the adapters in a value of LORA. A missing weight is 1.

    Their files are not looked at: the engine does that, in a thread of its own.

    Raises:
        InvalidInput: The value is no such list, has too many adapters, one of them twice, an impossible name, or a
            weight out of range.
    """
    if len(text) > MAX_LORA_CHARACTERS:
        raise InvalidInput.of("LORA", text, f"at most {MAX_LORA_CHARACTERS:,} characters")
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidInput.of("LORA", text, "a JSON list") from None
    if not isinstance(entries, list):
        raise InvalidInput.of("LORA", text, FORM)
    if len(entries) > MAX_ADAPTERS:
        raise InvalidInput.of("LORA", f"a list of {len(entries)} adapters", f"at most {MAX_ADAPTERS}")
    adapters = tuple(_adapter(entry) for entry in entries)
    for index, adapter in enumerate(adapters):
        if adapter.name in (other.name for other in adapters[:index]):
            raise InvalidInput.of("LORA", f"a list with {adapter.name} twice", "each adapter once")
    return adapters


def _adapter(entry: Any) -> Lora:
    if not isinstance(entry, dict) or not {"name"} <= entry.keys() <= {"name", "weight"}:
        raise InvalidInput.of("LORA", f"a list with {entry!r}", FORM)
    name, weight = entry["name"], entry.get("weight", 1.0)
    if not isinstance(name, str) or not is_adapter_name(name):
        raise InvalidInput.of("LORA", f"a list with the name {name!r}", "names of adapters in the server's folder")
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    # Compared before it is converted: a large integer has no float.
    if not is_number or not -MAX_WEIGHT <= weight <= MAX_WEIGHT or not math.isfinite(weight):
        raise InvalidInput.of(f"LORA's weight of {name}", weight, f"{-MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
    return Lora(name, float(weight))


def is_adapter_name(name: str) -> bool:
    """Return whether a name can be that of an adapter: a single visible part of a path."""
    return (
        bool(name)
        and name.isprintable()  # excludes NUL, line breaks and lone surrogates
        and not name.startswith(".")
        and not set(name) & {"/", "\\"}
        and len(name.encode()) <= MAX_NAME_BYTES
    )
