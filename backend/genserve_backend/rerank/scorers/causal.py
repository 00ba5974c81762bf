"""Causal reranker: a language model that answers yes or no, run by torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM
from typing_extensions import Unpack

from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.decoder import PackedDecoder
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.scorers.base import Placement, Slice, TorchScorer
from genserve_backend.rerank.scorers.layouts import Layout
from genserve_backend.rerank.scorers.prompts import Prompts
from genserve_backend.rerank.sentence_transformers import Pooling


class Causal(TorchScorer):
    """A ForCausalLM reranker.

    An output is the logits of "no" and "yes" after the last token; score = sigmoid(yes - no), the softmax over the two.
    The other logits of the vocabulary are never computed.
    """

    causal: ClassVar[bool] = True
    model_class: ClassVar[Any] = AutoModelForCausalLM

    def __init__(self, checkpoint: RerankCheckpoint, *, max_length: int, **placement: Unpack[Placement]) -> None:
        super().__init__(checkpoint, max_length=max_length, **placement)
        self._prompts = Prompts(
            checkpoint,
            config=self.model.config,
            tokenizer=self.tokenizer,
            max_length=max_length,
            shares=self.packs and placement["prefix_cache_bytes"] > 0,
        )
        head = self.model.get_output_embeddings()
        answers = self._prompts.answers
        self._weight = head.weight.detach()[answers].float()
        self._bias = None if head.bias is None else head.bias.detach()[answers].float()
        # Drop the head: with a large vocabulary it takes a good part of a small model's memory.
        self.model = self.model.base_model
        if self._fuses:
            self.model = PackedDecoder(self.model)
            if self.compiled:
                self.model.compile_parts()

    @property
    def pooling(self) -> Pooling:
        """The last token: the answer would follow it."""
        return "lasttoken"

    def stop_compiling(self) -> None:
        """Run the model without torch.compile from now on."""
        if isinstance(self.model, PackedDecoder):
            self.compiled = False
            self.model.uncompile_parts()
        else:
            super().stop_compiling()

    def tokenize(self, request: RerankRequest) -> Iterator[Slice]:
        """Yield a prompt for each window of each document."""
        return self._prompts.tokenize(request)

    def outputs(self, layout: Layout, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the logits of no and yes, float32 [prompts, 2]."""
        hidden = self.model(**inputs, use_cache=False).last_hidden_state
        last = layout.pool(hidden, self.pooling)
        return torch.nn.functional.linear(last.float(), self._weight, self._bias)

    def scores(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the sigmoid of yes minus no."""
        return (outputs[:, 1] - outputs[:, 0]).sigmoid()
