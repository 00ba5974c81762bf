"""Helpers for checkpoint folders. They load no weights and do not import torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class CheckpointError(Exception):
    """A checkpoint folder is missing, incomplete, or of an unsupported kind; the message is one line."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Raises:
        CheckpointError: The file is missing, unreadable or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not JSON") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def require_folder(path: Path, *, setting: str) -> None:
    """Raise CheckpointError unless `path` is a folder. The message names `setting`, which the operator can change."""
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint folder at {path} (set {setting})")


def require_safetensors(folder: Path) -> None:
    """Raise CheckpointError unless `folder` has safetensors weights: pickles are never loaded."""
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"no .safetensors weights in {folder} (pickled weights are never loaded)")
