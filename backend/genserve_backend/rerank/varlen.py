"""Attention over packed sequences in one kernel: torch's FlashAttention for sequences of varying length, on GPUs.

Without it, `attention` falls back to one call per sequence, which costs a GPU one kernel launch per sequence and layer.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from genserve_backend.logs import log

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # older torch
    varlen_attn = None

DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes that FlashAttention supports."""
_MAX_HEAD = 256
"""The widest head that FlashAttention supports."""
_PROBE_TOLERANCE = 0.05
"""Largest accepted difference from float32 in the probe, whose values are about 1; bfloat16 has 8 bits."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Offsets:
    """The boundaries of packed sequences.

    Attributes:
        tensor: int32 ``[sequences + 1]`` on the device, from 0 to the number of tokens.
        longest: Tokens of the longest sequence.
    """

    tensor: Tensor
    longest: int


@dataclass(frozen=True)
class Kernel:
    """A way to call ``varlen_attn`` that works with this torch.

    Attributes:
        options: Names of the optional arguments to pass. torch 2.11 has neither ``enable_gqa`` nor ``num_splits``;
            2.12 accepts the latter in Python but not in its FlashAttention-2 build.
        repeat_heads: Whether to repeat grouped keys and values, one copy per query head.
    """

    options: frozenset[str]
    repeat_heads: bool = False


def serves(query: Tensor) -> bool:
    """Return whether the kernel supports `query`, ``[1, heads, tokens, head]``: half precision, on a GPU."""
    return (
        query.is_cuda
        and query.dtype in DTYPES
        and query.shape[-1] <= _MAX_HEAD
        and query.shape[-1] % 8 == 0
        and find_kernel(query.device, query.dtype) is not None
    )


@lru_cache
def find_kernel(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """Try the kernel on a small input and return the way to call it; None, with a warning, if it fails."""
    reasons = []
    for kernel in _candidates():
        try:
            error = _probe(kernel, device, dtype)
        except (RuntimeError, TypeError, ValueError) as failure:
            reasons.append(str(failure).strip().partition("\n")[0])
            continue
        if error <= _PROBE_TOLERANCE:
            return kernel
        reasons.append(f"results differ from float32 by {error:.3g}")
    log(
        logger,
        logging.WARNING,
        "attention falls back to one call per sequence",
        torch=torch.__version__,
        reason=reasons[-1] if reasons else "this torch has no varlen_attn",
    )
    return None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_offsets: Offsets,
    key_offsets: Offsets,
    causal: bool,
    window: int | None,
    scaling: float | None,
) -> Tensor:
    """Compute attention of each sequence's queries over its own keys; fewer queries are its last tokens.

    Args:
        query: ``[1, heads, queries, head]``, the sequences one after another.
        key: ``[1, heads, keys, head]``; may have fewer heads.
        value: The same.
        query_offsets: Offsets of the sequences among the queries.
        key_offsets: Offsets of the sequences among the keys, including their prefixes.
        causal: Whether a token attends only to itself and earlier tokens.
        window: Distance to both sides that a token attends to, counting its own position; None for no limit.
        scaling: Scale of the scores; by default one over the square root of the head width.

    Returns:
        ``[1, queries, heads, head]``.
    """
    kernel = find_kernel(query.device, query.dtype)
    if kernel is None:
        raise RuntimeError("no kernel for packed attention")
    return _call(
        kernel,
        query,
        key,
        value,
        query_offsets=query_offsets,
        key_offsets=key_offsets,
        causal=causal,
        window=window,
        scaling=scaling,
    )


def _call(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_offsets: Offsets,
    key_offsets: Offsets,
    causal: bool,
    window: int | None,
    scaling: float | None,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if kernel.repeat_heads and groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # With several splits a score would depend on the rest of the batch.
    options = {"enable_gqa": groups > 1, "num_splits": 1}
    distance = -1 if window is None else window - 1
    attended: Tensor = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        query_offsets.tensor,
        key_offsets.tensor,
        query_offsets.longest,
        key_offsets.longest,
        scale=scaling,
        window_size=(distance, 0 if causal else distance),
        **{name: options[name] for name in kernel.options},
    )
    return attended[None]


def _candidates() -> Iterator[Kernel]:
    """Yield the ways to call the kernel, the best first."""
    if varlen_attn is None:
        return
    supported = inspect.signature(varlen_attn).parameters.keys() & {"enable_gqa", "num_splits"}
    yield Kernel(frozenset(supported))
    if "num_splits" in supported:
        yield Kernel(frozenset(supported - {"num_splits"}))
    yield Kernel(frozenset(), repeat_heads=True)


def _probe(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest difference from float32, for grouped heads, fewer queries than keys, and a window."""
    lengths = ((3, 9), (5, 5), (1, 4))
    draw = torch.Generator("cpu").manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, sum(pair[part] for pair in lengths), 64, generator=draw).to(device, dtype)
        for heads, part in ((4, 0), (2, 1), (2, 1))
    )
    query_offsets, key_offsets = (_offsets([pair[part] for pair in lengths], device) for part in (0, 1))
    difference = 0.0
    for causal, window in ((True, None), (True, 3), (False, None)):
        attended = _call(
            kernel,
            query,
            key,
            value,
            query_offsets=query_offsets,
            key_offsets=key_offsets,
            causal=causal,
            window=window,
            scaling=None,
        ).transpose(1, 2)
        first_query = first_key = 0
        for queries, keys in lengths:
            positions = torch.arange(keys - queries, keys, device=device)[:, None]
            distance = positions - torch.arange(keys, device=device)
            mask = (distance >= 0) | (not causal)
            mask &= distance.abs() < (window or keys)
            expected = functional.scaled_dot_product_attention(
                query[:, :, first_query : first_query + queries].float(),
                key[:, :, first_key : first_key + keys].float(),
                value[:, :, first_key : first_key + keys].float(),
                attn_mask=mask,
                enable_gqa=True,
            )
            got = attended[:, :, first_query : first_query + queries].float()
            difference = max(difference, float((got - expected).abs().max()))
            first_query, first_key = first_query + queries, first_key + keys
    return difference


def _offsets(lengths: list[int], device: torch.device) -> Offsets:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return Offsets(ends, max(lengths))
