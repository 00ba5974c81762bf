"""A bi-encoder: query and documents are embedded apart, the score is how close their directions are."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, ClassVar

import torch
from transformers import AutoModel

from genserve_backend.checkpoints import CheckpointError
from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.scorers.base import Encoded, Padded, Scorer
from genserve_backend.rerank.scorers.text import Template, token_ids
from genserve_backend.rerank.sentence import Pooling


class BiEncoder(Scorer):
    """A sentence-transformers model with pooling.

    The query is a sequence of its own in front of the documents, so it is embedded once, in the company of documents
    of its length. A row is an embedding; score = (cosine + 1) / 2. An instruction has no effect: the prompts are the
    checkpoint's.
    """

    model_class: ClassVar[Any] = AutoModel
    # The pooler is a head of BERT's pretraining, which no sentence embedding reads and many folders leave out.
    unused_weights: ClassVar[str] = "pooler"

    def __init__(
        self, checkpoint: RerankCheckpoint, *, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if checkpoint.sentence is None:
            raise CheckpointError(f"{checkpoint.path} says nothing about pooling")
        super().__init__(checkpoint, max_length=max_length, dtype=dtype, device=device)
        self._sentence = checkpoint.sentence
        self._template = Template.of(self.tokenizer, texts=1, filler=self.pad)
        self._room = self._template.room(max_length, at_least=1)

    def encode(self, request: RerankRequest, check: Callable[[], None]) -> Encoded:
        """The query's sequence and the documents', each cut to the limit."""
        query = self._sentence.query_prompt + request.query
        documents = (self._sentence.document_prompt + document for document in request.documents)
        texts = (text.lower() if self._sentence.lowercase else text for text in chain([query], documents))
        sequences = [
            self._template.around(ids[: self._room], truncated=len(ids) > self._room)
            for ids in token_ids(self.tokenizer, texts, check)
        ]
        return Encoded(sequences, leading=1, query_truncated=sequences[0].truncated)

    def rows(self, padded: Padded) -> torch.Tensor:
        """Embeddings: float32 [sequences, hidden]."""
        hidden = self.model(**self.encoder_inputs(padded)).last_hidden_state
        return pool(hidden.float(), padded, self._sentence.pooling)

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """Compare the first row with all others."""
        cosine = torch.nn.functional.cosine_similarity(rows[:1], rows[1:])
        return ((cosine + 1) / 2).clamp(0, 1)


def pool(hidden: torch.Tensor, padded: Padded, mode: Pooling) -> torch.Tensor:
    """One embedding [sequences, hidden] out of the token embeddings [sequences, tokens, hidden]."""
    if mode == "cls":
        return hidden[:, 0]
    if mode == "lasttoken":
        return padded.last(hidden)
    outside = ~padded.mask.unsqueeze(-1)
    if mode == "max":
        return hidden.masked_fill(outside, float("-inf")).amax(dim=1)
    return hidden.masked_fill(outside, 0).sum(dim=1) / padded.mask.sum(dim=1, keepdim=True)
