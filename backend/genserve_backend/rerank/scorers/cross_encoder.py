"""Cross-encoder: query and document form one sequence, and a classifier with one label scores it."""

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
from genserve_backend.rerank.sentence_transformers import Pooling


class CrossEncoder(TorchScorer):
    """A ForSequenceClassification model with one label.

    An output is the label's logit; score = sigmoid(logit). Only documents are cut, unless the query leaves no room for
    a single token of a document: then the query is cut to half of the room. An instruction has no effect.
    """

    model_class: ClassVar[Any] = AutoModelForSequenceClassification

    def __init__(self, checkpoint: RerankCheckpoint, *, max_length: int, **placement: Unpack[Placement]) -> None:
        super().__init__(checkpoint, max_length=max_length, **placement)
        self._template = Template.of(self.tokenizer, texts=2, filler=self.pad)
        self._room = self._template.room(max_length, at_least=2)

    @property
    def pooling(self) -> Pooling:
        """The first token, which the classifier uses."""
        return "cls"

    def tokenize(self, request: RerankRequest) -> Iterator[Slice]:
        """Yield a pair for each window of each document."""
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

    def outputs(self, layout: Layout, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the logits, [pairs, 1]."""
        logits: torch.Tensor = self.model(**inputs).logits
        return logits

    def scores(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the sigmoid of the logits."""
        return outputs[:, 0].sigmoid()
