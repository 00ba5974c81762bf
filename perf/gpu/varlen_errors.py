"""Errors of the reranker's attention against float32 arithmetic, and between sequences alone and batched."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from typing import Any

import torch
from torch import Tensor

from genserve_backend.rerank import varlen
from genserve_backend.rerank.attention import Packing, attend
from gpu.part import Run

HEADS = ((16, 8), (12, 12))
"""Heads of queries, and of keys and values."""
WIDTHS = (128, 64)
WINDOW = 64


@dataclass(frozen=True)
class Case:
    """Parameters of an attention, and the lengths of its sequences."""

    heads: tuple[int, int]
    width: int
    causal: bool
    window: int | None
    queries: str
    """`all` of a sequence's tokens, its last `half`, or `one`."""
    keys: tuple[int, ...]

    @property
    def lengths(self) -> list[int]:
        """Return the number of queries of each sequence."""
        if self.queries == "one":
            return [1] * len(self.keys)
        return [keys if self.queries == "all" else (keys + 1) // 2 for keys in self.keys]

    def draw(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return random queries, keys and values, ``[1, heads, tokens, width]`` in bfloat16."""
        generator = torch.Generator("cpu").manual_seed(0)
        sizes = ((self.heads[0], sum(self.lengths)), (self.heads[1], sum(self.keys)), (self.heads[1], sum(self.keys)))
        query, key, value = (
            torch.randn(1, tokens, heads, self.width, generator=generator).to(device, torch.bfloat16).transpose(1, 2)
            for heads, tokens in sizes
        )
        return query, key, value


def errors(run: Run) -> None:
    """Write the largest errors of the kernel and its fallback, and the differences between alone and batched."""
    run.result("varlen-kernel", torch=torch.__version__, kernel=_chosen(run.clock.device))
    rng = random.Random(0)
    keys = (1, 7, 90) if run.tiny else (*(rng.choice((1, 7, 64, 200, 513)) for _ in range(23)), 1500)
    kinds = product(HEADS, WIDTHS[-1:] if run.tiny else WIDTHS, (True, False), (None, WINDOW), ("all", "half", "one"))
    for heads, width, causal, window, queries in kinds:
        case = Case(heads, width, causal, window, queries, keys)
        for name, call in (("kernel", kernel), ("fallback", fallback)):
            _write(run, case, name, call)


def _chosen(device: torch.device) -> str | None:
    """Return the working call of the kernel on this device."""
    found = varlen.find_kernel(device, torch.bfloat16)
    return None if found is None else str(found)


def _write(run: Run, case: Case, name: str, call: Any) -> None:
    row = {
        "what": name,
        "heads": f"{case.heads[0]} / {case.heads[1]}",
        "width": case.width,
        "causal": case.causal,
        "window": case.window or 0,
        "queries": case.queries,
    }
    query, key, value = case.draw(run.clock.device)
    if name == "kernel" and not varlen.serves(query):
        nothing = dict.fromkeys(("greatest", "relative", "crowd", "identical"))
        run.result("varlen", **row, **nothing, reason="no such kernel on this device")
        return
    with run.isolate("varlen", **row):
        found = call(case, query, key, value)
        right = exact(case, query, key, value)
        apart = (found.float() - right).abs()
        crowd = _batched(case, call, query, key, value, found)
        relative = float((found.float() - right).norm() / right.norm())
        run.result("varlen", **row, greatest=float(apart.max()), relative=relative, crowd=crowd, identical=crowd == 0)


def kernel(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with `varlen.attend`."""
    return varlen.attend(
        query,
        key,
        value,
        query_offsets=_offsets(case.lengths, query.device),
        key_offsets=_offsets(case.keys, query.device),
        causal=case.causal,
        window=case.window,
        scaling=None,
    )


def _offsets(lengths: Sequence[int], device: torch.device) -> varlen.Offsets:
    return varlen.Offsets(torch.tensor([0, *accumulate(lengths)], device=device, dtype=torch.int32), max(lengths))


def fallback(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend sequence by sequence; leading keys without a query are its prefix."""
    one = case.queries == "one"
    packing = Packing(case.keys if one else case.lengths, last=True, key_lengths=case.keys)
    serves = varlen.serves
    varlen.serves = lambda _: False  # type: ignore[assignment]
    try:
        return attend(
            query,
            key,
            value,
            packing=packing,
            causal=case.causal,
            scaling=None,
            sliding_window=case.window,
            one_position=one,
        )
    finally:
        varlen.serves = serves


def exact(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend in float32, without a kernel: ``[1, queries, heads, width]``."""
    group = case.heads[0] // case.heads[1]
    parts = []
    for queries, keys, values in _sequences(case, query.float(), key.float(), value.float()):
        seen, asked = keys.shape[1], queries.shape[1]
        weights = queries @ keys.repeat_interleave(group, 0).transpose(1, 2) * case.width**-0.5
        columns = torch.arange(seen, device=query.device)
        distance = columns - columns[seen - asked :, None]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if case.causal:
            hidden |= distance > 0
        if case.window:
            hidden |= distance.abs() >= case.window
        weights = weights.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        parts.append(weights @ values.repeat_interleave(group, 0))
    return torch.cat(parts, dim=1).transpose(0, 1)[None]


def _sequences(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Sequence[tuple[Tensor, Tensor, Tensor]]:
    own = torch.split(query[0], case.lengths, dim=1)
    return list(
        zip(
            own, torch.split(key[0], list(case.keys), dim=1), torch.split(value[0], list(case.keys), dim=1), strict=True
        )
    )


def _batched(case: Case, call: Any, query: Tensor, key: Tensor, value: Tensor, crowd: Tensor) -> float:
    """Return the greatest difference between sequences alone and batched."""
    greatest = 0.0
    parts = torch.split(crowd, case.lengths, dim=1)
    for number, (queries, keys, values) in enumerate(_sequences(case, query, key, value)):
        single = Case(case.heads, case.width, case.causal, case.window, case.queries, (keys.shape[1],))
        alone = call(single, queries[None], keys[None], values[None])
        greatest = max(greatest, float((alone.float() - parts[number].float()).abs().max()))
    return greatest
