"""Bi-encoder: query and documents are embedded separately, and the score is their cosine similarity."""

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
from genserve_backend.rerank.sentence_transformers import Pooling


class BiEncoder(TorchScorer):
    """A sentence-transformers model with pooling.

    The query is embedded once, as a sequence of its own in front of the documents. An output is an embedding;
    score = (cosine + 1) / 2. An instruction has no effect: the prompts come from the checkpoint.
    """

    model_class: ClassVar[Any] = AutoModel
    # The pooler belongs to BERT's pretraining: no sentence embedding uses it, and many folders leave it out.
    unused_weights: ClassVar[str] = "pooler"

    def __init__(self, checkpoint: RerankCheckpoint, *, max_length: int, **placement: Unpack[Placement]) -> None:
        if checkpoint.embedding is None:
            raise CheckpointError(f"{checkpoint.path} has no pooling configuration")
        self._options = checkpoint.embedding
        super().__init__(checkpoint, max_length=max_length, **placement)
        self._template = Template.of(self.tokenizer, texts=1, filler=self.pad)
        self._room = self._template.room(max_length, at_least=1)

    @property
    def pooling(self) -> Pooling:
        """The pooling of the checkpoint."""
        return self._options.pooling

    def tokenize(self, request: RerankRequest) -> Iterator[Slice]:
        """Yield the sequence of the query and those of the documents, each cut to the limit."""
        query = self._options.query_prompt + request.query
        documents = (self._options.document_prompt + document for document in request.documents)
        texts = (text.lower() if self._options.lowercase else text for text in chain([query], documents))
        for first, ids, _ in token_ids(self.tokenizer, texts):
            sequences = [
                self._template.around(part, document=index - 1 if index else None, truncated=truncated)
                for index, each in enumerate(ids, first)
                for part, truncated in windows(each, self._room, at_most=request.windows if index else 1)
            ]
            tokenized = request.documents[max(first - 1, 0) : first - 1 + len(ids)]
            yield Slice(sequences, sum(map(len, tokenized)), query_truncated=not first and sequences[0].truncated)

    def outputs(self, layout: Layout, inputs: dict[str, Any]) -> torch.Tensor:
        """Return embeddings, float32 [sequences, hidden]."""
        return layout.pool(self.model(**inputs).last_hidden_state.float(), self.pooling)

    def scores(self, outputs: torch.Tensor) -> torch.Tensor:
        """Compare the first embedding, the query's, with all others."""
        cosine = torch.nn.functional.cosine_similarity(outputs[:1], outputs[1:])
        return ((cosine + 1) / 2).clamp(0, 1)
