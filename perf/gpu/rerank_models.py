"""Qwen3-Reranker with random weights, a tokenizer of made-up words, and texts of known lengths."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.scorers.prompts import ANSWERS, DEFAULT_INSTRUCTION, PREFIX, SUFFIX

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2},
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
"""As in the published configurations, but for the vocabulary, on whose size no score's time depends."""
HEAD = 128
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
WORDS = tuple(map("".join, product(("ka", "lo", "mi", "nu", "re", "so", "ta", "vi"), repeat=3)))
"""One token each, with a space before it."""
QUERY_WORDS = 10


def tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level BPE tokenizer like Qwen's, small enough to be trained on the spot."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8_192,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(SPECIAL),
    )
    made.train_from_iterator([f" {' '.join(WORDS)}", *ANSWERS, PREFIX, SUFFIX, DEFAULT_INSTRUCTION], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<|im_end|>",  # noqa: S106
        pad_token="<|endoftext|>",  # noqa: S106
        additional_special_tokens=list(SPECIAL),
    )


def checkpoint(shape: str, scratch: Path, device: str) -> Path:
    """Return the folder of a checkpoint with random weights in bfloat16, drawn on `device`; write it if need be."""
    folder = scratch / shape
    if folder.is_dir():
        return folder
    half = scratch / f"{shape}.{os.getpid()}"
    words = tokenizer()
    config = Qwen3Config(
        **SHAPES[shape],
        vocab_size=len(words),
        num_key_value_heads=min(8, SHAPES[shape]["num_attention_heads"]),
        head_dim=HEAD,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        pad_token_id=words.pad_token_id,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(half)
    words.save_pretrained(half)
    try:
        half.rename(folder)
    except OSError:
        shutil.rmtree(half)
        raise
    return folder


def texts(count: int, words: tuple[int, int], *, seed: int) -> tuple[str, ...]:
    """Draw documents of so many tokens, from and to."""
    rng = random.Random(seed)  # noqa: S311
    return tuple(" ".join(rng.choices(WORDS, k=rng.randint(*words))) for _ in range(count))


def requests(count: int, documents: int, words: tuple[int, int]) -> list[RerankRequest]:
    """Draw requests, each with a query of its own."""
    return [
        RerankRequest(
            texts(1, (QUERY_WORDS, QUERY_WORDS), seed=10_000 + number)[0],
            texts(documents, words, seed=number),
            None,
        )
        for number in range(count)
    ]


@dataclass(frozen=True)
class Arithmetic:
    """The count of a model's operations."""

    layers: int
    """Layers that all tokens pass; of the last one they need the keys and values alone."""
    matrices: int
    """Weights of such a layer that a token is multiplied by."""
    last: int
    """Weights of the last layer that a token is multiplied by."""
    heads: int

    @classmethod
    def of(cls, shape: str) -> Arithmetic:
        """Count the weights of a shape."""
        sizes = SHAPES[shape]
        width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        values = 2 * width * min(8, heads) * HEAD
        matrices = values + 2 * width * heads * HEAD + 3 * width * sizes["intermediate_size"]
        return cls(sizes["num_hidden_layers"] - 1, matrices, values, heads)

    def flops(self, lengths: Sequence[int], seen: Sequence[int]) -> float:
        """Return the operations of a forward.

        Args:
            lengths: Tokens of each sequence that are read.
            seen: Tokens of each sequence, with those before them that are known.
        """
        products = 2 * sum(lengths) * (self.layers * self.matrices + self.last)
        # Of n tokens read, the last one looks at all that is seen, the first one at n - 1 fewer.
        pairs = sum(length * (whole - (length - 1) / 2) for length, whole in zip(lengths, seen, strict=True))
        return products + 4 * pairs * self.heads * HEAD * self.layers


class Padded:
    """The reranker as its model card runs it: transformers, left padding, the logits of the last position.

    Args:
        folder: The checkpoint.
        device: Where it runs.
        batch: Pairs of a forward.
    """

    def __init__(self, folder: Path, device: str, *, batch: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._device = device
        self._batch = batch
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left", local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
        self._model = model.to(device).eval()
        self._answers = self._tokenizer.convert_tokens_to_ids(list(ANSWERS))

    @torch.inference_mode()
    def __call__(self, asked: Sequence[RerankRequest]) -> list[list[float]]:
        """Return the scores of all documents, request by request."""
        prompts = [
            f"{PREFIX}<Instruct>: {DEFAULT_INSTRUCTION}\n<Query>: {request.query}\n<Document>: {document}{SUFFIX}"
            for request in asked
            for document in request.documents
        ]
        scores: list[float] = []
        for first in range(0, len(prompts), self._batch):
            inputs = self._tokenizer(
                prompts[first : first + self._batch], padding=True, return_tensors="pt", add_special_tokens=False
            ).to(self._device)
            logits = self._model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1, self._answers].float()
            scores += (logits[:, 1] - logits[:, 0]).sigmoid().tolist()
        rest = iter(scores)
        return [[next(rest) for _ in request.documents] for request in asked]
