"""Loading of models and tokenizers from a folder: never from a hub, never with code from the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from genserve_backend.checkpoints import CheckpointError


def load_tokenizer(path: Path) -> Any:
    """Load the fast tokenizer in `path`.

    Raises:
        CheckpointError: There is none, or it cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:
        # transformers and its parsers raise a dozen exception types for broken files.
        raise CheckpointError(f"cannot load the tokenizer in {path}: {_first_line(error)}") from error
    if not tokenizer.is_fast:
        raise CheckpointError(f"{path} has no fast tokenizer (tokenizer.json)")
    return tokenizer


def load_config(path: Path) -> Any:
    """Load the transformers config in `path`.

    Raises:
        CheckpointError: It cannot be loaded, or transformers does not support the model.
    """
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read the config in {path}: {_first_line(error)}") from error


def load_model(
    auto_class: Any, path: Path, *, dtype: torch.dtype, device: torch.device, unused_weights: str = ""
) -> Any:
    """Load the model in `path` for inference, with the weights directly on the device.

    Args:
        auto_class: A transformers Auto class.
        path: A folder with config.json and safetensors weights.
        dtype: Dtype of the weights.
        device: Device of the weights.
        unused_weights: Weights with this in their name may be missing; "" for none.

    Raises:
        CheckpointError: The model cannot be loaded, or weights are missing from the folder. (transformers would
            initialize them randomly, and every score would be noise.)
    """
    # A worker's stderr is its log, with one event per line.
    transformers_logging.disable_progress_bar()
    try:
        model, report = auto_class.from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=True,
            dtype=dtype,
            device_map={"": device},
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise CheckpointError(f"cannot load the model in {path}: {_first_line(error)}") from error
    missing = sorted(key for key in report["missing_keys"] if not unused_weights or unused_weights not in key)
    if missing:
        raise CheckpointError(f"the weights in {path} lack {len(missing)} tensors, {missing[0]} for one")
    return model.eval().to(device)  # including buffers


def pad_id(model: Any, tokenizer: Any) -> int:
    """Return the padding token id and set it in the config of `model`: some models find the end of a text by it."""
    candidates = (model.config.pad_token_id, tokenizer.pad_token_id, 0)
    chosen = next(value for value in candidates if isinstance(value, int) and value >= 0)
    model.config.pad_token_id = chosen
    return chosen


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
