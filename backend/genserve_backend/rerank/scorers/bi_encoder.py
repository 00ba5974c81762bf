"""A bi-encoder: query and documents are embedded apart, the score is how close their directions are."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, ClassVar

import torch
from transformers import AutoModel
from typing_extensions import Unpack

from genserve_backend.checkpoints import CheckpointError
from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.scorers.base import Placement, Slice, TorchScorer
from genserve_backend.rerank.scorers.layouts import Layout
from genserve_backend.rerank.scorers.text import Template, token_ids, windows
from genserve_backend.rerank.sentence import Pooling


class BiEncoder(TorchScorer):
    """A sentence-transformers model with pooling.

    The query is a sequence of its own in front of the documents, so it is embedded once, in the company of documents
    of its length. A row is an embedding; score = (cosine + 1) / 2. An instruction has no effect: the prompts are the
    checkpoint's.
    """

    model_class: ClassVar[Any] = AutoModel
    # The pooler is a head of BERT's pretraining, which no sentence embedding reads and many folders leave out.
    unused_weights: ClassVar[str] = "pooler"

    def __init__(self, checkpoint: RerankCheckpoint, *, max_length: int, **placement: Unpack[Placement]) -> None:
        if checkpoint.sentence is None:
            raise CheckpointError(f"{checkpoint.path} says nothing about pooling")
        self._sentence = checkpoint.sentence
        super().__init__(checkpoint, max_length=max_length, **placement)
        self._template = Template.of(self.tokenizer, texts=1, filler=self.pad)
        self._room = self._template.room(max_length, at_least=1)

    @property
    def pooling(self) -> Pooling:
        """What the checkpoint says."""
        return self._sentence.pooling

    def read(self, request: RerankRequest) -> Iterator[Slice]:
        """The query's sequence and the documents', each cut to the limit."""
        query = self._sentence.query_prompt + request.query
        documents = (self._sentence.document_prompt + document for document in request.documents)
        texts = (text.lower() if self._sentence.lowercase else text for text in chain([query], documents))
        for first, ids, _ in token_ids(self.tokenizer, texts):
            sequences = [
                self._template.around(part, document=number - 1 if number else None, truncated=truncated)
                for number, each in enumerate(ids, first)
                for part, truncated in windows(each, self._room, at_most=request.windows if number else 1)
            ]
            read = request.documents[max(first - 1, 0) : first - 1 + len(ids)]
            yield Slice(sequences, sum(map(len, read)), query_truncated=not first and sequences[0].truncated)

    def rows(self, layout: Layout, inputs: dict[str, Any]) -> torch.Tensor:
        """Embeddings: float32 [sequences, hidden]."""
        return layout.pool(self.model(**inputs).last_hidden_state.float(), self.pooling)

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """Compare the first row with all others."""
        cosine = torch.nn.functional.cosine_similarity(rows[:1], rows[1:])
        return ((cosine + 1) / 2).clamp(0, 1)
