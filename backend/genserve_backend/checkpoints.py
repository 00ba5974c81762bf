"""Reading what a checkpoint folder says about itself, without loading a weight or importing torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class CheckpointError(Exception):
    """A checkpoint folder is missing, incomplete, or of a kind that is not served; one line says which."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        CheckpointError: The file is absent, unreadable or holds something else.
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
    """Raise CheckpointError unless `path` is a folder; `setting` names what the operator can change."""
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint folder at {path} (set {setting})")


def require_safetensors(folder: Path) -> None:
    """Raise CheckpointError unless `folder` holds safetensors weights: pickles are never loaded."""
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"no .safetensors weights in {folder} (pickled weights are never loaded)")
