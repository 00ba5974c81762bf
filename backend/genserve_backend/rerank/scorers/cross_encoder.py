"""A cross-encoder: query and document are read together, a classifier with one label gives the score."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from transformers import AutoModelForSequenceClassification
from typing_extensions import Unpack

from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.scorers.base import Placement, Slice, TorchScorer
from genserve_backend.rerank.scorers.layouts import Layout
from genserve_backend.rerank.scorers.text import Template, one_text, token_ids, windows
from genserve_backend.rerank.sentence import Pooling


class CrossEncoder(TorchScorer):
    """A ForSequenceClassification model with one label.

    A row is the label's logit; score = sigmoid(logit). Only documents are cut, except where a query would leave no
    room for a single token of a document: then it is cut to half of the room. An instruction has no effect.
    """

    model_class: ClassVar[Any] = AutoModelForSequenceClassification

    def __init__(self, checkpoint: RerankCheckpoint, *, max_length: int, **placement: Unpack[Placement]) -> None:
        super().__init__(checkpoint, max_length=max_length, **placement)
        self._template = Template.of(self.tokenizer, texts=2, filler=self.pad)
        self._room = self._template.room(max_length, at_least=2)

    @property
    def pooling(self) -> Pooling:
        """The classifier reads the first token."""
        return "cls"

    def read(self, request: RerankRequest) -> Iterator[Slice]:
        """One pair for each document."""
        query = one_text(self.tokenizer, request.query)
        query_truncated = len(query) >= self._room
        if query_truncated:
            query = query[: self._room // 2]
        room = self._room - len(query)
        for first, ids, characters in token_ids(self.tokenizer, request.documents):
            sequences = [
                self._template.around(query, part, document=document, truncated=truncated)
                for document, each in enumerate(ids, first)
                for part, truncated in windows(each, room, at_most=request.windows)
            ]
            yield Slice(sequences, characters, query_truncated)

    def rows(self, layout: Layout, inputs: dict[str, Any]) -> torch.Tensor:
        """Logits: [pairs, 1]."""
        logits: torch.Tensor = self.model(**inputs).logits
        return logits

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """The sigmoid of the only column."""
        return rows[:, 0].sigmoid()
