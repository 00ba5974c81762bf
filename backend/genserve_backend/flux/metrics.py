"""Metrics of the FLUX engine; flux/report.py counts them."""

from __future__ import annotations

from genserve_backend.worker.metrics import ENGINE_METRICS, Counter, Gauge, Histogram, Metric, stage_seconds

DECODING = Gauge("genserve_decoding", "Images that are being decoded")
STEPS = Counter("genserve_steps_total", "Denoising steps, counted per image")
SKIPPED_STEPS = Counter("genserve_skipped_steps_total", "Denoising steps that were skipped, see CACHE")
PREEMPTIONS = Counter("genserve_preemptions_total", "Times an image lost its slot to a more urgent one")
REFUSED = Counter(
    "genserve_missed_deadlines_total",
    "Images that failed with DeadlineExceeded in the engine, by reason",
    (("reason", "refused"),),
)
EXPIRED = Counter(REFUSED.name, REFUSED.help, (("reason", "expired"),))
ADAPTERS = Gauge("genserve_adapters", "LoRA adapters on the device")
ADAPTER_BYTES = Gauge("genserve_adapter_bytes", "Device memory of LoRA adapters, with the copies that forwards read")
ADAPTER_LOADS = Counter("genserve_adapter_loads_total", "Files of LoRA adapters that were loaded")
ADAPTER_EVICTIONS = Counter("genserve_adapter_evictions_total", "LoRA adapters dropped from device memory")
ENCODE_SECONDS = stage_seconds("encode")
DENOISE_SECONDS = stage_seconds("denoise")
DECODE_SECONDS = stage_seconds("decode")
BATCH_SIZE = Histogram("genserve_batch_size", "Images per forward", (1, 2, 4, 8, 12, 16, 24, 32, 64))

METRICS: tuple[Metric, ...] = (
    *ENGINE_METRICS,
    DECODING,
    STEPS,
    SKIPPED_STEPS,
    PREEMPTIONS,
    REFUSED,
    EXPIRED,
    ADAPTERS,
    ADAPTER_BYTES,
    ADAPTER_LOADS,
    ADAPTER_EVICTIONS,
    ENCODE_SECONDS,
    DENOISE_SECONDS,
    DECODE_SECONDS,
    BATCH_SIZE,
)
