"""The attention kernel that torch takes for each shape of FLUX and of the rerankers, and what the others would take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from gpu.part import Run
from gpu.varlen_errors import Case, fallback, kernel

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
LARGEST_SCORES = 8 * 2**30
"""Bytes of float32 scores up to which plain arithmetic is tried."""


@dataclass(frozen=True)
class Shape:
    """An attention as a model asks for it."""

    what: str
    rows: int
    heads: int
    tokens: int
    width: int
    mask: str = ""
    """`rows`: the second half of the rows is shorter. `left`: padded on the left and causal. `bias`: numbers."""
    causal: bool = False
    key_heads: int = 0
    queries: int = 0
    """The last so many tokens; 0 for all."""

    def draw(self, device: torch.device) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """Return random queries, keys and values with a model's strides, and the keyword arguments."""
        key_heads = self.key_heads or self.heads
        query, key, value = (
            torch.randn(self.rows, tokens, heads, self.width, device=device, dtype=torch.bfloat16).transpose(1, 2)
            for tokens, heads in (
                (self.queries or self.tokens, self.heads),
                (self.tokens, key_heads),
                (self.tokens, key_heads),
            )
        )
        options: dict[str, Any] = {"attn_mask": self._mask(device), "is_causal": self.causal}
        if key_heads != self.heads:
            options["enable_gqa"] = True
        return (query, key, value), options

    def _mask(self, device: torch.device) -> Tensor | None:
        if not self.mask:
            return None
        columns = torch.arange(self.tokens, device=device)
        if self.mask == "bias":
            shape = (1, self.heads, self.tokens, self.tokens)
            return torch.randn(shape, device=device, dtype=torch.bfloat16)
        cut = torch.zeros(self.rows, device=device, dtype=torch.long)
        cut[self.rows // 2 :] = self.tokens // 16
        if self.mask == "rows":
            return (columns < (self.tokens - cut)[:, None])[:, None, None]
        lower = columns <= columns[:, None]
        return (lower & (columns >= cut[:, None, None]))[:, None]

    @property
    def flops(self) -> float:
        """Return the number of operations, half of them where it is causal."""
        pairs = (self.queries or self.tokens) * self.tokens
        return 4.0 * self.rows * self.heads * pairs * self.width * (0.5 if self.causal else 1.0)


SHAPES = (
    Shape("FLUX 1024, 1 row", 1, 24, 4608, 128),
    Shape("FLUX 1024, 4 rows", 4, 24, 4608, 128),
    Shape("FLUX 1024, 4 rows, masked", 4, 24, 4608, 128, mask="rows"),
    Shape("FLUX 512, 1 row", 1, 24, 1536, 128),
    Shape("FLUX 512, 8 rows", 8, 24, 1536, 128),
    Shape("FLUX 512, 8 rows, masked", 8, 24, 1536, 128, mask="rows"),
    Shape("VAE 1024", 1, 1, 16384, 512),
    Shape("VAE 512", 1, 1, 4096, 512),
    Shape("CLIP", 1, 12, 77, 64, causal=True),
    Shape("T5 with its bias", 1, 64, 512, 64, mask="bias"),
    Shape("Qwen3, one sequence", 1, 16, 240, 128, causal=True, key_heads=8),
    Shape("Qwen3, one position", 1, 16, 240, 128, key_heads=8, queries=1),
    Shape("Qwen3, 32 padded rows", 32, 16, 256, 128, mask="left", key_heads=8),
    Shape("cross-encoder, one sequence", 1, 12, 240, 64),
)


def kernels(run: Run) -> None:
    """Write what scaled_dot_product_attention takes for each shape, and the time of every kernel that would do."""
    for shape in SHAPES:
        _shape(run, _small(shape) if run.tiny else shape)
    _packed(run)


def _small(shape: Shape) -> Shape:
    tokens = min(shape.tokens, 64)
    return Shape(
        shape.what,
        min(shape.rows, 2),
        2,
        tokens,
        16,
        shape.mask,
        shape.causal,
        1 if shape.key_heads else 0,
        shape.queries,
    )


def _shape(run: Run, shape: Shape) -> None:
    inputs, options = shape.draw(run.clock.device)

    def attend() -> Tensor:
        return scaled_dot_product_attention(*inputs, **options)

    row = {"what": shape.what, "shape": f"{shape.rows} x {shape.heads} x {shape.tokens} x {shape.width}"}
    try:
        timing = run.clock.run(attend, seconds=0.3)
        with run.clock.watch(operators=True) as watched:
            attend()
    except RuntimeError as error:
        run.result("attention", **row, taken=None, ms=None, reason=_first_line(error))
        return
    operator = next((name for name in watched.operators if "scaled_dot_product_" in name and "::_" in name), "?")
    found = {
        "taken": operator.removeprefix("aten::_scaled_dot_product_"),
        "kernel": watched.kernels.most_common(1)[0][0] if watched.kernels else "?",
        "ms": timing.ms,
        "first_ms": timing.first_ms,
        "tflops": shape.flops / timing.ms / 1e9,
    }
    run.result("attention", **row, **found)
    for name, backend in BACKENDS.items():
        _backend(run, shape, row, name, backend, attend)


def _backend(
    run: Run, shape: Shape, row: dict[str, Any], name: str, backend: SDPBackend, attend: Callable[[], Tensor]
) -> None:
    """Write the time of one kernel, or why it will not do."""
    if name == "math" and 4 * shape.rows * shape.heads * shape.tokens**2 > LARGEST_SCORES:
        run.result("attention-kernels", **row, backend=name, ms=None, reason="the scores are too large")
        return
    try:
        with sdpa_kernel([backend]):
            timing = run.clock.run(attend, seconds=0.3)
    except RuntimeError as error:
        run.result("attention-kernels", **row, backend=name, ms=None, reason=_first_line(error))
        return
    tflops = shape.flops / timing.ms / 1e9
    run.result("attention-kernels", **row, backend=name, first_ms=timing.first_ms, ms=timing.ms, tflops=tflops)


def _packed(run: Run) -> None:
    """Write the time of a reranker's attention over packed sequences, in one kernel and one by one."""
    count, tokens = (2, 20) if run.tiny else (64, 240)
    for queries in ("all", "half", "one"):
        case = Case((16, 8), 128, True, None, queries, (tokens,) * count)
        inputs = case.draw(run.clock.device)
        for name, attend in (("in one kernel", kernel), ("one by one", fallback)):
            row = {"what": f"{count} x {tokens} tokens packed, {queries} of them asked", "way": name}
            try:
                timing = run.clock.run(partial(attend, case, *inputs), seconds=0.3)
            except Exception as error:  # a kernel that this torch lacks, in whatever way it says so
                run.result("attention-packed", **row, ms=None, reason=_first_line(error))
                continue
            run.result(
                "attention-packed",
                **row,
                first_ms=timing.first_ms,
                host_ms=timing.host_ms,
                device_ms=timing.device_ms,
                row_ms=timing.row_ms,
            )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
