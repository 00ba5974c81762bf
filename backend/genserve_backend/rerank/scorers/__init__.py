"""The kinds of reranker, and the table that says which class serves which."""

from __future__ import annotations

import torch

from genserve_backend.devices import resolve_dtype
from genserve_backend.rerank.checkpoint import Kind, RerankCheckpoint
from genserve_backend.rerank.scorers.base import Scorer
from genserve_backend.rerank.scorers.bi_encoder import BiEncoder
from genserve_backend.rerank.scorers.causal import Causal
from genserve_backend.rerank.scorers.cross_encoder import CrossEncoder
from genserve_backend.settings import RerankSettings

SCORERS: dict[Kind, type[Scorer]] = {
    "bi-encoder": BiEncoder,
    "cross-encoder": CrossEncoder,
    "causal": Causal,
}


def load_scorer(checkpoint: RerankCheckpoint, settings: RerankSettings, device: str) -> Scorer:
    """Load a checkpoint as its kind demands.

    Args:
        checkpoint: What was found in the folder.
        settings: `max_length` lowers the checkpoint's limit and never raises it; `dtype` is the weights' arithmetic.
        device: As torch names it: "cpu", "cuda:0".

    Raises:
        CheckpointError: The folder cannot be loaded, or the limit leaves no room for a text.
    """
    target = torch.device(device)
    limit = min(checkpoint.max_length, settings.max_length or checkpoint.max_length)
    scorer = SCORERS[checkpoint.kind]
    return scorer(
        checkpoint,
        max_length=limit,
        dtype=resolve_dtype(settings.dtype, device),
        device=target,
        prefix_cache_bytes=settings.prefix_cache_bytes,
    )
