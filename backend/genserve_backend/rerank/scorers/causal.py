"""A causal language model that answers yes or no, with the template that Qwen3-Reranker was published with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM

from genserve_backend.checkpoints import CheckpointError
from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.scorers.base import Encoded, Padded, Scorer, TokenSequence
from genserve_backend.rerank.scorers.text import token_ids

PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"

# Models with one of these do something to the logits behind the last matrix, which two rows of it cannot show.
_LOGIT_CHANGES = ("final_logit_softcapping", "logits_scaling", "logit_scale")


class Causal(Scorer):
    """A ForCausalLM reranker.

    A row is the pair of logits of "no" and "yes" behind the last token; score = sigmoid(yes - no), which is the softmax
    over the two. The rest of the vocabulary is never computed. The body of a prompt is tokenised and cut alone, so the
    question at its end is always asked.
    """

    model_class: ClassVar[Any] = AutoModelForCausalLM

    def __init__(
        self, checkpoint: RerankCheckpoint, *, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(checkpoint, max_length=max_length, dtype=dtype, device=device)
        for name in _LOGIT_CHANGES:
            if getattr(self.model.config, name, None) not in (None, 1, 1.0):
                raise CheckpointError(f"{checkpoint.path} has {name} in its config.json, which is not served")
        self._prefix, self._suffix = token_ids(self.tokenizer, (PREFIX, SUFFIX), lambda: None)
        self._room = max_length - len(self._prefix) - len(self._suffix)
        if self._room < 1:
            raise CheckpointError(f"a limit of {max_length} tokens leaves no room in the prompt template")
        head = self.model.get_output_embeddings()
        answers = [self._answer_id("no"), self._answer_id("yes")]
        self._weight = head.weight.detach()[answers].float()
        self._bias = None if head.bias is None else head.bias.detach()[answers].float()
        # Only the decoder is kept: the head of a large vocabulary is a good part of a small model's memory.
        self.model = self.model.base_model

    def encode(self, request: RerankRequest, check: Callable[[], None]) -> Encoded:
        """One prompt for each document."""
        head = f"<Instruct>: {request.instruction or DEFAULT_INSTRUCTION}\n<Query>: {request.query}\n<Document>: "
        bodies = (head + document for document in request.documents)
        sequences = [self._prompt(body) for body in token_ids(self.tokenizer, bodies, check)]
        bare = next(token_ids(self.tokenizer, [head], check))
        return Encoded(sequences, query_truncated=len(bare) > self._room)

    def rows(self, padded: Padded) -> torch.Tensor:
        """Logits of no and yes: float32 [prompts, 2]."""
        # No attention mask: padding stands on the right, where nothing before it looks, and without a mask torch may
        # use its faster causal kernels.
        hidden = self.model(input_ids=padded.ids, use_cache=False).last_hidden_state
        return torch.nn.functional.linear(padded.last(hidden).float(), self._weight, self._bias)

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """The sigmoid of yes minus no."""
        return (rows[:, 1] - rows[:, 0]).sigmoid()

    def _prompt(self, body: list[int]) -> TokenSequence:
        ids = self._prefix + body[: self._room] + self._suffix
        return TokenSequence(ids, [0] * len(ids), truncated=len(body) > self._room)

    def _answer_id(self, word: str) -> int:
        found = self.tokenizer.convert_tokens_to_ids(word)
        if not isinstance(found, int) or found == self.tokenizer.unk_token_id:
            raise CheckpointError(f'"{word}" is no token of {self.checkpoint.path}: this is not a yes/no reranker')
        return found
