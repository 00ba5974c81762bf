"""A cross-encoder: query and document are read together, a classifier with one label gives the score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from transformers import AutoModelForSequenceClassification

from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.scorers.base import Encoded, Padded, Scorer
from genserve_backend.rerank.scorers.text import Template, token_ids


class CrossEncoder(Scorer):
    """A ForSequenceClassification model with one label.

    A row is the label's logit; score = sigmoid(logit). Only documents are cut, except where a query would leave no
    room for a single token of a document: then it is cut to half of the room. An instruction has no effect.
    """

    model_class: ClassVar[Any] = AutoModelForSequenceClassification

    def __init__(
        self, checkpoint: RerankCheckpoint, *, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(checkpoint, max_length=max_length, dtype=dtype, device=device)
        self._template = Template.of(self.tokenizer, texts=2, filler=self.pad)
        self._room = self._template.room(max_length, at_least=2)

    def encode(self, request: RerankRequest, check: Callable[[], None]) -> Encoded:
        """One pair for each document."""
        query = next(token_ids(self.tokenizer, [request.query], check))
        query_truncated = len(query) >= self._room
        if query_truncated:
            query = query[: self._room // 2]
        room = self._room - len(query)
        sequences = [
            self._template.around(query, ids[:room], truncated=len(ids) > room)
            for ids in token_ids(self.tokenizer, request.documents, check)
        ]
        return Encoded(sequences, query_truncated=query_truncated)

    def rows(self, padded: Padded) -> torch.Tensor:
        """Logits: float32 [pairs, 1]."""
        logits: torch.Tensor = self.model(**self.encoder_inputs(padded)).logits
        return logits.float()

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """The sigmoid of the only column."""
        return rows[:, 0].sigmoid()
