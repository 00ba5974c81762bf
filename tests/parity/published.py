"""The published Qwen3-Reranker: the code of its model card, for the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


class Qwen3Reranker:
    """The whole model with the logits of the whole vocabulary, on batches padded on the left.

    Args:
        folder: A checkpoint.
        max_length: Tokens of a prompt, at most.
    """

    def __init__(self, folder: Path, *, max_length: int = 8192) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self._max_length = max_length
        self._answers = [self.tokenizer.convert_tokens_to_ids(word) for word in ("no", "yes")]

    def scores(
        self, query: str, documents: Sequence[str], *, instruction: str = INSTRUCTION, batch_size: int = 4
    ) -> list[float]:
        """Return the score of each document."""
        batches = (documents[first : first + batch_size] for first in range(0, len(documents), batch_size))
        return [score for batch in batches for score in self._batch(query, batch, instruction)]

    def _batch(self, query: str, documents: Sequence[str], instruction: str) -> list[float]:
        before, after = (self.tokenizer.encode(text, add_special_tokens=False) for text in (PREFIX, SUFFIX))
        inputs = self.tokenizer(
            [f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}" for document in documents],
            padding=False,
            truncation="longest_first",
            return_attention_mask=False,
            max_length=self._max_length - len(before) - len(after),
        )
        prompts = {"input_ids": [before + body + after for body in inputs["input_ids"]]}
        padded = self.tokenizer.pad(prompts, padding=True, return_tensors="pt")
        with torch.no_grad():
            # Logits of the last position only: those of all positions would take gigabytes.
            logits = self.model(**padded, logits_to_keep=1).logits[:, -1, self._answers]
        scores: list[float] = torch.log_softmax(logits, dim=1)[:, 1].exp().tolist()
        return scores
