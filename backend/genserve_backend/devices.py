"""Which arithmetic a device runs a model in."""

from __future__ import annotations

import torch

from genserve_backend.settings import DType


def resolve_dtype(dtype: DType, device: str) -> torch.dtype:
    """The torch dtype for a setting; auto is bfloat16 on a GPU and float32 on a CPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    named: torch.dtype = getattr(torch, dtype)
    return named
