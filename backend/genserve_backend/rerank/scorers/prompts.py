"""Prompts of causal rerankers, for torch and vLLM: the template that Qwen3-Reranker was published with."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

from genserve_backend.checkpoints import CheckpointError
from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.prefix import Prefix, shared_length
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.scorers.base import Slice
from genserve_backend.rerank.scorers.layouts import TokenSequence
from genserve_backend.rerank.scorers.text import ends_word, one_text, token_ids, windows

PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
INTRODUCTION = "<Document>: "
"""The text between the query's line and the document."""
ANSWERS = ("no", "yes")
INSTRUCTIONS = 32
"""Texts that many requests share, most of them instructions, whose tokens are kept."""

# These options change the logits after the last matrix, so two of its rows alone would give other scores.
_LOGIT_CHANGES = ("final_logit_softcapping", "logits_scaling", "logit_scale")


class Prompts:
    """Builds the token ids of prompts.

    Only the body of a prompt is cut to the limit, never the template around it.

    Args:
        checkpoint: The checkpoint, for errors.
        config: Its transformers config.
        tokenizer: Its tokenizer.
        max_length: Tokens of a prompt, at most.
        shares: Whether prompts name their shared prefix, for `PrefixCache`.

    Raises:
        CheckpointError: This is no yes/no reranker, or `max_length` leaves no room for a text.
    """

    def __init__(
        self, checkpoint: RerankCheckpoint, *, config: Any, tokenizer: Any, max_length: int, shares: bool
    ) -> None:
        for name in _LOGIT_CHANGES:
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise CheckpointError(f"{checkpoint.path} has {name} in its config.json, which is not served")
        self._tokenizer = tokenizer
        self._shares = shares
        self._prefix, self._suffix = (one_text(tokenizer, text) for text in (PREFIX, SUFFIX))
        self._fixed = lru_cache(INSTRUCTIONS)(partial(one_text, tokenizer))
        self._room = max_length - len(self._prefix) - len(self._suffix)
        if self._room < 1:
            raise CheckpointError(f"a limit of {max_length} tokens leaves no room in the prompt template")
        self.answers = [_answer_id(tokenizer, word, checkpoint) for word in ANSWERS]
        """The token ids of no and yes."""

    def tokenize(self, request: RerankRequest) -> Iterator[Slice]:
        """Yield a prompt for each window of each document."""
        lead = f"<Instruct>: {request.instruction or DEFAULT_INSTRUCTION}\n<Query>: "
        before = f"{lead}{request.query}\n"
        lead_ids, head_ids = self._fixed(lead), one_text(self._tokenizer, before + INTRODUCTION)
        before_ids = self._whole_words(before, head_ids)
        repeated = INTRODUCTION if before_ids else before + INTRODUCTION
        texts = (repeated + document for document in request.documents)
        for first, texts_ids, characters in token_ids(self._tokenizer, texts):
            ids = [before_ids + each for each in texts_ids] if before_ids else texts_ids
            prefix = self._shared_prefix(lead_ids, head_ids, ids, alone=len(request.documents) == 1)
            sequences = [
                self._prompt(part, document, prefix, truncated=truncated)
                for document, body in enumerate(ids, first)
                for part, truncated in self._windows(body, head_ids, at_most=request.windows)
            ]
            documents = characters - len(repeated) * len(ids)
            yield Slice(sequences, documents, query_truncated=len(head_ids) > self._room)

    def _whole_words(self, before: str, head: list[int]) -> list[int]:
        """Return the tokens of the text before `INTRODUCTION`; none if they may depend on a document.

        With them, a prompt's instruction and query are tokenized once for all documents. Tokenizers that split texts
        into words do so from left to right, and the first word of `INTRODUCTION` keeps documents away from theirs.
        """
        if not ends_word(self._tokenizer, before, INTRODUCTION):
            return []
        alone = one_text(self._tokenizer, before)
        return alone if alone + self._fixed(INTRODUCTION) == head else []

    def _windows(self, body: list[int], head: list[int], *, at_most: int) -> list[tuple[list[int], bool]]:
        """Split the document of a body that is too long; every window repeats the instruction and the query."""
        kept = shared_length([body], head)
        if len(body) <= self._room or kept >= self._room or at_most == 1:
            return [(body[: self._room], len(body) > self._room)]
        parts = windows(body[kept:], self._room - kept, at_most=at_most)
        return [(body[:kept] + part, truncated) for part, truncated in parts]

    def _prompt(self, body: list[int], document: int, prefix: Prefix | None, *, truncated: bool) -> TokenSequence:
        ids = self._prefix + body + self._suffix
        return TokenSequence(ids, [], document, truncated, prefix)

    def _shared_prefix(
        self, lead: list[int], head: list[int], bodies: list[list[int]], *, alone: bool
    ) -> Prefix | None:
        """Return the prefix that the prompts of `bodies` share. Its parent is shared with other queries.

        A single document shares only the parent: nothing would reuse the keys and values of its query.
        """
        if not self._shares:
            return None
        instructed = min(shared_length([head, *bodies], lead), self._room)
        parent = Prefix(tuple(self._prefix + lead[:instructed]))
        length = instructed if alone else min(shared_length(bodies, head), self._room)
        return Prefix(tuple(self._prefix + head[:length]), parent) if length > instructed else parent


def _answer_id(tokenizer: Any, word: str, checkpoint: RerankCheckpoint) -> int:
    found = tokenizer.convert_tokens_to_ids(word)
    if not isinstance(found, int) or found == tokenizer.unk_token_id:
        raise CheckpointError(f'"{word}" is no token of {checkpoint.path}: this is not a yes/no reranker')
    return found
