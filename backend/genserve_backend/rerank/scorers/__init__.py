"""Scorers: the kinds of reranker, and the class that serves each of them with torch."""

from __future__ import annotations

import logging

import torch

from genserve_backend.checkpoints import CheckpointError
from genserve_backend.compilation import stop_compilers, use_cache
from genserve_backend.devices import resolve_dtype
from genserve_backend.logs import log
from genserve_backend.matrices import has_int8
from genserve_backend.rerank.checkpoint import Kind, RerankCheckpoint
from genserve_backend.rerank.scorers.base import Scorer, TorchScorer
from genserve_backend.rerank.scorers.bi_encoder import BiEncoder
from genserve_backend.rerank.scorers.causal import Causal
from genserve_backend.rerank.scorers.cross_encoder import CrossEncoder
from genserve_backend.rerank.scorers.vllm import VllmCausal
from genserve_backend.settings import RerankSettings

logger = logging.getLogger(__name__)

SCORERS: dict[Kind, type[TorchScorer]] = {
    "bi-encoder": BiEncoder,
    "cross-encoder": CrossEncoder,
    "causal": Causal,
}


def build_scorer(checkpoint: RerankCheckpoint, settings: RerankSettings, device: str) -> Scorer:
    """Load a checkpoint and return the scorer for its kind and the configured engine.

    Args:
        checkpoint: The checkpoint to load.
        settings: `max_length` lowers the checkpoint's limit and never raises it; `dtype` is the dtype of the weights.
        device: In torch's notation: "cpu", "cuda:0".

    Raises:
        CheckpointError: The folder cannot be loaded, the limit leaves no room for a text, or the device has no int8.
    """
    target = torch.device(device)
    limit = min(checkpoint.max_length, settings.max_length or checkpoint.max_length)
    if settings.engine == "vllm":
        return VllmCausal(checkpoint, settings, target, max_length=limit)
    int8 = settings.dtype == "int8"
    if int8 and not (target.type == "cpu" and has_int8()):
        raise CheckpointError(f"int8 needs a CPU that has VNNI, and this instance is on {device}")
    if settings.compiles(device):
        use_cache(settings.compile_cache)
    scorer = SCORERS[checkpoint.kind](
        checkpoint,
        max_length=limit,
        dtype=resolve_dtype(settings.dtype, device),
        int8=int8,
        compiled=settings.compiles(device),
        device=target,
        prefix_cache_bytes=settings.prefix_cache_bytes,
    )
    if scorer.compiled:
        _warm_up(scorer, settings.token_budget(device))
        stop_compilers()
    return scorer


def _warm_up(scorer: TorchScorer, tokens: int) -> None:
    """Compile the model; if that fails, log a warning and run it without."""
    try:
        scorer.warm_up(tokens)
    except torch.AcceleratorError:
        raise  # the device rejects all further work
    except Exception as error:
        scorer.stop_compiling()
        reason = str(error).strip().partition("\n")[0]
        log(
            logger,
            logging.WARNING,
            "the model runs without torch.compile",
            error=type(error).__name__,
            reason=reason,
            setting="RERANK_COMPILE",
        )
