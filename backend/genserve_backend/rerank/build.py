"""Construction of the rerank engine from a checkpoint."""

from __future__ import annotations

import logging

import torch

from genserve_backend.logs import log
from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.engine import RerankEngine
from genserve_backend.rerank.report import Reporter
from genserve_backend.rerank.score_cache import ScoreCache
from genserve_backend.rerank.scorers import build_scorer
from genserve_backend.settings import RerankSettings
from genserve_backend.worker.engine import Emit

logger = logging.getLogger(__name__)


def build(settings: RerankSettings, device: str, emit: Emit) -> RerankEngine:
    """Build the engine for the checkpoint in `settings` on `device` ("cpu", "cuda:0").

    Raises:
        CheckpointError: The checkpoint is missing, incomplete or of a kind that is not served.
    """
    checkpoint = RerankCheckpoint.load(settings.model_path)
    scorer = build_scorer(checkpoint, settings, device)
    log(
        logger,
        logging.INFO,
        "reranker loaded",
        model=checkpoint.name,
        kind=checkpoint.kind,
        engine=settings.engine,
        device=device,
        packed=scorer.packs,
    )
    return RerankEngine(
        scorer=scorer,
        score_cache=ScoreCache(max_bytes=settings.score_cache_bytes),
        reporter=Reporter(device=torch.device(device), emit=emit),
        settings=settings,
        max_num_batched_tokens=settings.token_budget(device),
        emit=emit,
    )
