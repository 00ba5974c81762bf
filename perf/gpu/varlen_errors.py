"""The reranker's attention against float32 arithmetic, and the same sequences alone and batched."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from genserve_backend.rerank import varlen
from genserve_backend.rerank.attention import KeysValues, Packing, packed_attention
from gpu.part import Run

HEADS = ((16, 8), (12, 12))
"""Heads of queries, and of keys and values."""
WIDTHS = (128, 64)
WINDOW = 64


@dataclass(frozen=True)
class Case:
    """A kind of attention, and the lengths of its sequences."""

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
    """Write the greatest error of the kernel and of its fallback, and the difference that a batch makes."""
    run.result("varlen-kernel", torch=torch.__version__, kernel=_chosen(run.clock.device))
    rng = random.Random(0)  # noqa: S311
    keys = (1, 7, 90) if run.tiny else (*(rng.choice((1, 7, 64, 200, 513)) for _ in range(23)), 1500)
    kinds = product(HEADS, WIDTHS[-1:] if run.tiny else WIDTHS, (True, False), (None, WINDOW), ("all", "half", "one"))
    for heads, width, causal, window, queries in kinds:
        case = Case(heads, width, causal, window, queries, keys)
        for name, attend in (("kernel", kernel), ("fallback", fallback)):
            _write(run, case, name, attend)


def _chosen(device: torch.device) -> str | None:
    """Return the way to call the kernel that works here."""
    found = varlen.find_kernel(device, torch.bfloat16)
    return None if found is None else str(found)


def _write(run: Run, case: Case, name: str, attend: Any) -> None:
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
        run.result("varlen", **row, **nothing, reason="no such kernel here")
        return
    with run.trying("varlen", **row):
        found = attend(case, query, key, value)
        right = exact(case, query, key, value)
        apart = (found.float() - right).abs()
        crowd = _batched(case, attend, query, key, value, found)
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
    """Attend sequence by sequence, with what a sequence continues as its prefix."""
    layer = SimpleNamespace(is_causal=case.causal, layer_idx=0)
    own, prefixes = _split(case, key, value)
    one = case.queries == "one"
    packing = Packing(case.keys if one else case.lengths, last=True, prefixes=[] if one else prefixes)
    serves = varlen.serves
    varlen.serves = lambda _: False  # type: ignore[assignment]
    try:
        keys, values = (key, value) if one else own
        found: Tensor = packed_attention(
            layer, query, keys, values, None, packing=packing, sliding_window=case.window, one_position=one
        )[0]
    finally:
        varlen.serves = serves
    return found


def _split(case: Case, key: Tensor, value: Tensor) -> tuple[tuple[Tensor, Tensor], list[KeysValues | None]]:
    """Cut keys and values into those of the tokens that are read, and those of what they continue."""
    prefixes: list[KeysValues | None] = []
    keys, values = [], []
    end = 0
    for length, whole in zip(case.lengths, case.keys, strict=True):
        start, end = end, end + whole
        middle = end - length
        known = (key[:, :, start:middle], value[:, :, start:middle])
        prefixes.append(KeysValues((known,)) if middle > start else None)
        keys.append(key[:, :, middle:end])
        values.append(value[:, :, middle:end])
    return (torch.cat(keys, dim=2), torch.cat(values, dim=2)), prefixes


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


def _batched(case: Case, attend: Any, query: Tensor, key: Tensor, value: Tensor, crowd: Tensor) -> float:
    """Return the greatest difference between sequences alone and batched."""
    greatest = 0.0
    parts = torch.split(crowd, case.lengths, dim=1)
    for number, (queries, keys, values) in enumerate(_sequences(case, query, key, value)):
        single = Case(case.heads, case.width, case.causal, case.window, case.queries, (keys.shape[1],))
        alone = attend(single, queries[None], keys[None], values[None])
        greatest = max(greatest, float((alone.float() - parts[number].float()).abs().max()))
    return greatest
