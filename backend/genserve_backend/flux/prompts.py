"""Prompt encoding: batches of prompts, with a cache of embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cachetools import LRUCache
from diffusers import FluxPipeline

from genserve_backend.devices import move
from genserve_backend.errors import RequestError
from genserve_backend.worker.isolate import isolate

MAX_PROMPTS = 16
"""Prompts in one forward of the text encoders, at most."""


@dataclass(frozen=True)
class Embedding:
    """An encoded prompt, the transformer's input."""

    tokens: torch.Tensor
    """T5 output, ``[max_sequence_length, joint_attention_dim]``."""
    pooled: torch.Tensor
    """CLIP output, ``[pooled_projection_dim]``."""

    @property
    def size(self) -> int:
        """Size in bytes."""
        return int(self.tokens.nbytes + self.pooled.nbytes)


class PromptEncoder:
    """The two text encoders, with a cache of the latest embeddings.

    Args:
        pipeline: The pipeline with the encoders and tokenizers.
        max_sequence_length: T5 tokens of a prompt.
        cache_bytes: Limit on the device memory of the cache; eviction is least recently used first.
        max_prompts: Prompts in one forward.
    """

    def __init__(
        self, pipeline: FluxPipeline, *, max_sequence_length: int, cache_bytes: int, max_prompts: int = MAX_PROMPTS
    ) -> None:
        self._pipeline = pipeline
        self._max_prompts = max_prompts
        self._max_sequence_length = max_sequence_length
        self._cache: LRUCache[str, Embedding] = LRUCache(cache_bytes, getsizeof=lambda embedding: embedding.size)

    @property
    def cached_bytes(self) -> int:
        """Device memory that the cache uses."""
        return int(self._cache.currsize)

    def encode(self, texts: Iterable[str]) -> tuple[dict[str, Embedding], dict[str, RequestError]]:
        """Return the embedding of each text, and the errors of texts that cannot be encoded."""
        found: dict[str, Embedding] = {}
        missing: list[str] = []
        for text in dict.fromkeys(texts):
            embedding = self._cache.get(text)
            if embedding is None:
                missing.append(text)
            else:
                found[text] = embedding
        failed: dict[str, RequestError] = {}
        for first in range(0, len(missing), self._max_prompts):
            encoded, errors = isolate(self._forward, missing[first : first + self._max_prompts], name=_name)
            found |= encoded
            failed |= errors
            for text, embedding in encoded.items():
                if embedding.size <= self._cache.maxsize:
                    self._cache[text] = embedding
        return found, failed

    def _forward(self, texts: Sequence[str]) -> list[Embedding]:
        """Encode like FluxPipeline's ``encode_prompt``, without its handling of adapters and truncated text."""
        pipeline, texts = self._pipeline, list(texts)
        clip = self._tokenize(pipeline.tokenizer, texts, pipeline.tokenizer_max_length)
        pooled = pipeline.text_encoder(move(clip, pipeline.text_encoder.device)).pooler_output
        t5 = self._tokenize(pipeline.tokenizer_2, texts, self._max_sequence_length)
        tokens = pipeline.text_encoder_2(move(t5, pipeline.text_encoder_2.device))[0]
        # Copies: a cached view would keep the memory of the whole batch.
        return [Embedding(*pair) for pair in zip(map(torch.clone, tokens), map(torch.clone, pooled), strict=True)]

    @staticmethod
    def _tokenize(tokenizer: Any, texts: list[str], length: int) -> torch.Tensor:
        """Return token ids ``[texts, length]``, padded or truncated."""
        ids: torch.Tensor = tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return ids


def _name(text: str) -> str:
    return f"a prompt of {len(text):,} characters"
