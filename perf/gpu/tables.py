"""The tables of a report, in their order: which values of which lines they show."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table: its columns by header, and the key of each in the lines."""

    name: str
    title: str
    columns: dict[str, str]


CARD = Table(
    "card",
    "The card",
    {
        "device": "device",
        "memory, GiB": "memory_gib",
        "multiprocessors": "multiprocessors",
        "capability": "capability",
        "driver": "driver",
        "CUDA": "cuda",
        "cuDNN": "cudnn",
        "Python": "python",
        "torch": "torch",
        "diffusers": "diffusers",
        "transformers": "transformers",
    },
)
NAMED = {"variant": "variant", "pixels": "size", "rows": "rows", "masked": "masked"}
MODEL = {"model": "model", "variant": "variant"}
KERNEL = {"": "place", "kernel": "kernel", "calls": "count", "ms": "ms", "share": "share"}
TABLES = (
    CARD,
    Table("rates", "Rates", {"": "what", "of": "detail", "ms": "ms", "TFLOP/s": "tflops", "GB/s": "gb_per_s"}),
    Table(
        "matrices",
        "Matrix products in bfloat16, by shape",
        {
            "": "what",
            "rows": "rows",
            "width": "width",
            "outputs": "outputs",
            "ms": "ms",
            "TFLOP/s": "tflops",
            "of the matrix rate": "rate_share",
        },
    ),
    Table("varlen-kernel", "The kernel of packed attention", {"torch": "torch", "called with": "kernel"}),
    Table(
        "varlen",
        "The reranker's attention against float32 arithmetic",
        {
            "": "what",
            "heads": "heads",
            "width": "width",
            "causal": "causal",
            "window": "window",
            "queries": "queries",
            "greatest error": "greatest",
            "relative error": "relative",
            "alone less batched": "crowd",
        },
    ),
    Table(
        "images",
        "The demo's FLUX, same seeds",
        {
            "": "dtype",
            "one": "one",
            "other": "other",
            "images": "images",
            "greatest difference, levels": "greatest",
            "values that differ": "share",
            "by more than 1": "beyond_one",
            "mean": "mean",
        },
    ),
    Table(
        "waits",
        "Lines that wait for the device",
        {"": "what", "times": "count", "line": "ours", "in": "line"},
    ),
    Table(
        "scores",
        "A document's score, alone and batched",
        {
            "one": "one",
            "other": "other",
            "documents": "documents",
            "greatest difference": "greatest",
            "identical": "identical",
            "highest less lowest score": "spread",
        },
    ),
    Table(
        "attention",
        "The attention that torch takes",
        {"": "what", "shape": "shape", "taken": "taken", "first, ms": "first_ms", "ms": "ms", "TFLOP/s": "tflops"},
    ),
    Table(
        "attention-kernels",
        "What each kernel takes",
        {"": "what", "kernel": "backend", "first, ms": "first_ms", "ms": "ms", "TFLOP/s": "tflops"},
    ),
    Table(
        "attention-packed",
        "Attention over packed sequences",
        {"": "what", "way": "way", "first, ms": "first_ms", "host, ms": "host_ms", "device, ms": "device_ms"},
    ),
    Table("memory", "Memory, MB", {"": "what", "allocated": "used_mb", "peak": "peak_mb", "reserved": "reserved_mb"}),
    Table(
        "starts",
        "Starts",
        {
            "": "what",
            "variant": "variant",
            "built, s": "built_s",
            "assembled, s": "assembled_s",
            "loaded, s": "loaded_s",
            "allocated, MB": "used_mb",
        },
    ),
    Table(
        "flux-steps",
        "FLUX.1-dev's shape: a step",
        {
            **NAMED,
            "first, ms": "first_ms",
            "host, ms": "host_ms",
            "device, ms": "device_ms",
            "in a row, ms": "row_ms",
            "spread": "spread",
            "TFLOP/s": "tflops",
            "of the matrix rate": "rate_share",
            "peak, MB": "peak_mb",
        },
    ),
    Table(
        "flux-images",
        "FLUX.1-dev's shape: whole images",
        {
            "": "contender",
            "pixels": "size",
            "at once": "at_once",
            "steps": "steps",
            "s": "seconds",
            "s an image": "an_image_s",
            "first, s": "first_s",
            "is": "ratio",
            "peak, MB": "peak_mb",
        },
    ),
    Table(
        "flux-codecs",
        "FLUX.1-dev's shape: the codecs",
        {"": "what", "of": "detail", "first, ms": "first_ms", "in a row, ms": "row_ms", "peak, MB": "peak_mb"},
    ),
    Table("flux-busy", "FLUX: kernels of a step", {**NAMED, "kernels": "kernels", "ms": "busy_ms", "idle": "idle"}),
    Table("flux-kernels", "FLUX: the most expensive kernels of a step", {**NAMED, **KERNEL}),
    Table(
        "rerank-engine",
        "Qwen3-Reranker's shapes: documents a second",
        {
            **MODEL,
            "load": "load",
            "": "contender",
            "documents": "pairs",
            "s": "seconds",
            "documents/s": "pairs_per_s",
            "is": "ratio",
            "scores apart": "scores_apart",
            "peak, MB": "peak_mb",
        },
    ),
    Table(
        "rerank-idle",
        "Qwen3-Reranker's shapes: the device's idle share, profiler counted in",
        {**MODEL, "load": "load", "busy, ms": "busy_ms", "of ms": "span_ms", "idle": "idle"},
    ),
    Table(
        "rerank-forwards",
        "Qwen3-Reranker's shapes: a forward",
        {
            **MODEL,
            "shared prefix": "prefix",
            "a document": "document",
            "tokens": "tokens",
            "sequences": "sequences",
            "first, ms": "first_ms",
            "in a row, ms": "row_ms",
            "tokens/s": "tokens_per_s",
            "TFLOP/s": "tflops",
            "of the matrix rate": "rate_share",
            "idle": "idle",
        },
    ),
    Table(
        "rerank-reading",
        "Qwen3-Reranker's shapes: the tokenizer",
        {"model": "model", "tokens": "tokens", "tokens/s": "tokens_per_s"},
    ),
    Table(
        "rerank-kernels",
        "Qwen3-Reranker's shapes: the most expensive kernels of a forward",
        {**MODEL, "shared prefix": "prefix", "a document": "document", "tokens": "tokens", **KERNEL},
    ),
)
SHARES = frozenset({"share", "beyond_one", "identical", "idle", "rate_share", "spread"})
"""Values shown in per cent; but `spread` of scores is a number of its own."""
PLAIN = frozenset({("scores", "spread")})
