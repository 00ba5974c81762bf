"""Conversion of Triton tensors to plain values per row, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from genserve_backend.errors import InvalidInput

Values = dict[str, Any]
"""The tensors of one row, as plain values."""


def parse_rows(request: Any, *, scalars: Sequence[str], lists: Sequence[str] = ()) -> list[Values]:
    """Return one dict per row of a ``[B, ...]`` request: a str, int or float per scalar, a list per list tensor.

    Omitted tensors have no key. The values are copies, so they outlive the request.

    Raises:
        InvalidInput: A tensor has the wrong shape, or text that is not UTF-8.
    """
    rows: list[Values] = []
    for name in (*scalars, *lists):
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is None:
            continue
        array = tensor.as_numpy()
        if array.ndim != 2 or (name in scalars and array.shape[1] != 1):
            wanted = "[B, 1]" if name in scalars else "[B, N]"
            raise InvalidInput(f"{name} has shape {list(array.shape)}; allowed: {wanted}")
        if not rows:
            rows = [{} for _ in range(array.shape[0])]
        if len(rows) != array.shape[0]:
            raise InvalidInput(f"{name} has {array.shape[0]} rows where another tensor has {len(rows)}")
        for row, values in zip(rows, array, strict=True):
            plain = [_plain(name, value) for value in values]
            row[name] = plain if name in lists else plain[0]
    return rows


def parse_text(request: Any, name: str, default: str = "") -> str:
    """Return the string in a ``[1]`` tensor, or `default` if the tensor is omitted.

    Raises:
        InvalidInput: The tensor has another number of elements, or its text is not UTF-8.
    """
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return default
    values = tensor.as_numpy().reshape(-1)
    if values.size != 1:
        raise InvalidInput(f"{name} has {values.size} elements; allowed: 1")
    return str(_plain(name, values[0]))


def _plain(name: str, value: Any) -> str | int | float:
    if not isinstance(value, bytes):
        plain: int | float = value.item()
        return plain
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidInput.of(name, value, "UTF-8 text") from None


def bytes_tensor(name: str, values: Sequence[bytes | str], shape: Sequence[int]) -> Any:
    """Return a BYTES tensor. Its dtype is object, because numpy's bytes type drops trailing zero bytes."""
    data = [value.encode() if isinstance(value, str) else value for value in values]
    return pb_utils.Tensor(name, np.array(data, dtype=np.object_).reshape(shape))


def number_tensor(name: str, values: Sequence[float], shape: Sequence[int], dtype: npt.DTypeLike) -> Any:
    """Return a tensor of numbers."""
    return pb_utils.Tensor(name, np.array(values, dtype=dtype).reshape(shape))
