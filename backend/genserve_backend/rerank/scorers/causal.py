"""A causal language model that answers yes or no, with the template that Qwen3-Reranker was published with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM
from typing_extensions import Unpack

from genserve_backend.checkpoints import CheckpointError
from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.prefix import Prefix, shared
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.scorers.base import Placement, Scorer, Slice
from genserve_backend.rerank.scorers.layouts import Layout, TokenSequence
from genserve_backend.rerank.scorers.text import one_text, token_ids, windows
from genserve_backend.rerank.sentence import Pooling

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

    causal: ClassVar[bool] = True
    model_class: ClassVar[Any] = AutoModelForCausalLM

    def __init__(self, checkpoint: RerankCheckpoint, *, max_length: int, **placement: Unpack[Placement]) -> None:
        super().__init__(checkpoint, max_length=max_length, **placement)
        for name in _LOGIT_CHANGES:
            if getattr(self.model.config, name, None) not in (None, 1, 1.0):
                raise CheckpointError(f"{checkpoint.path} has {name} in its config.json, which is not served")
        self._shares = placement["prefix_cache_bytes"] > 0
        self._prefix, self._suffix = (one_text(self.tokenizer, text) for text in (PREFIX, SUFFIX))
        self._room = max_length - len(self._prefix) - len(self._suffix)
        if self._room < 1:
            raise CheckpointError(f"a limit of {max_length} tokens leaves no room in the prompt template")
        head = self.model.get_output_embeddings()
        answers = [self._answer_id("no"), self._answer_id("yes")]
        self._weight = head.weight.detach()[answers].float()
        self._bias = None if head.bias is None else head.bias.detach()[answers].float()
        # Only the decoder is kept: the head of a large vocabulary is a good part of a small model's memory.
        self.model = self.model.base_model

    @property
    def pooling(self) -> Pooling:
        """The answer is what would come after the last token."""
        return "lasttoken"

    def read(self, request: RerankRequest) -> Iterator[Slice]:
        """One prompt for each document."""
        lead = f"<Instruct>: {request.instruction or DEFAULT_INSTRUCTION}\n<Query>: "
        head = f"{lead}{request.query}\n<Document>: "
        lead_ids, head_ids = one_text(self.tokenizer, lead), one_text(self.tokenizer, head)
        bodies = (head + document for document in request.documents)
        for first, ids, characters in token_ids(self.tokenizer, bodies):
            prefix = self._shared(lead_ids, head_ids, ids, alone=len(request.documents) == 1)
            sequences = [
                self._prompt(part, document, prefix, truncated=truncated)
                for document, body in enumerate(ids, first)
                for part, truncated in self._windows(body, head_ids, at_most=request.windows)
            ]
            yield Slice(sequences, characters - len(head) * len(ids), query_truncated=len(head_ids) > self._room)

    def _windows(self, body: list[int], head: list[int], *, at_most: int) -> list[tuple[list[int], bool]]:
        """A body whose document is too long in parts, each of them behind instruction and query."""
        kept = shared([body], head)
        if len(body) <= self._room or kept >= self._room or at_most == 1:
            return [(body[: self._room], len(body) > self._room)]
        parts = windows(body[kept:], self._room - kept, at_most=at_most)
        return [(body[:kept] + part, truncated) for part, truncated in parts]

    def rows(self, layout: Layout, inputs: dict[str, Any]) -> torch.Tensor:
        """Logits of no and yes: float32 [prompts, 2]."""
        hidden = self.model(**inputs, use_cache=False).last_hidden_state
        last = layout.pool(hidden, self.pooling)
        return torch.nn.functional.linear(last.float(), self._weight, self._bias)

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """The sigmoid of yes minus no."""
        return (rows[:, 1] - rows[:, 0]).sigmoid()

    def _prompt(self, body: list[int], document: int, prefix: Prefix | None, *, truncated: bool) -> TokenSequence:
        ids = self._prefix + body + self._suffix
        return TokenSequence(ids, [0] * len(ids), document, truncated, prefix)

    def _shared(self, lead: list[int], head: list[int], bodies: list[list[int]], *, alone: bool) -> Prefix | None:
        """What the prompts of `bodies` have in common, and in it what those of other queries have too.

        A single document gains nothing from its own query's keys and values.
        """
        if not (self.packs and self._shares):
            return None
        instructed = min(shared([head, *bodies], lead), self._room)
        parent = Prefix(tuple(self._prefix + lead[:instructed]))
        length = instructed if alone else min(shared(bodies, head), self._room)
        return Prefix(tuple(self._prefix + head[:length]), parent) if length > instructed else parent

    def _answer_id(self, word: str) -> int:
        found = self.tokenizer.convert_tokens_to_ids(word)
        if not isinstance(found, int) or found == self.tokenizer.unk_token_id:
            raise CheckpointError(f'"{word}" is no token of {self.checkpoint.path}: this is not a yes/no reranker')
        return found
