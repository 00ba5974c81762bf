"""Metrics of the rerank engine; rerank/report.py counts them."""

from __future__ import annotations

from genserve_backend.worker.metrics import ENGINE_METRICS, Counter, Histogram, Metric, stage_seconds

PAIRS = Counter("genserve_pairs_total", "Pairs of query and document that the model has scored")
TOKENS = Counter("genserve_tokens_total", "Tokens that the model has processed, excluding padding")
PADDING_TOKENS = Counter("genserve_padding_tokens_total", "Padding tokens that the model has processed")
PREFIX_TOKENS_SAVED = Counter(
    "genserve_prefix_tokens_saved_total", "Tokens that the model did not process again, thanks to shared prefixes"
)
QUEUE_SECONDS = Counter(
    "genserve_queue_seconds_total", "Seconds that requests waited in the engine for their first forward"
)
CACHE_HITS = Counter("genserve_score_cache_hits_total", "Pairs whose score was cached by an earlier request")
FORWARD_SECONDS = stage_seconds("forward")
BATCH_TOKENS = Histogram(
    "genserve_batch_tokens",
    "Tokens per forward, excluding padding",
    (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
)

METRICS: tuple[Metric, ...] = (
    *ENGINE_METRICS,
    PAIRS,
    TOKENS,
    PADDING_TOKENS,
    PREFIX_TOKENS_SAVED,
    QUEUE_SECONDS,
    CACHE_HITS,
    FORWARD_SECONDS,
    BATCH_TOKENS,
)
