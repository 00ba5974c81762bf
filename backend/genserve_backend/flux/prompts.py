"""Prompts to embeddings: many in one forward, and none twice."""

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
"""Prompts in one forward of the text encoders."""


@dataclass(frozen=True)
class Embedding:
    """A text as the transformer takes it."""

    tokens: torch.Tensor
    """T5's, ``[max_sequence_length, joint_attention_dim]``."""
    pooled: torch.Tensor
    """CLIP's, ``[pooled_projection_dim]``."""

    @property
    def size(self) -> int:
        """Bytes."""
        return int(self.tokens.nbytes + self.pooled.nbytes)


class PromptEncoder:
    """The two text encoders, with the embeddings of the last prompts kept.

    Args:
        pipeline: Encodes.
        max_sequence_length: T5 tokens of a prompt.
        cache_bytes: Device memory for embeddings, at most; the least recently used go first.
    """

    def __init__(self, pipeline: FluxPipeline, *, max_sequence_length: int, cache_bytes: int) -> None:
        self._pipeline = pipeline
        self._max_sequence_length = max_sequence_length
        self._cached: LRUCache[str, Embedding] = LRUCache(cache_bytes, getsizeof=lambda embedding: embedding.size)

    @property
    def cached_bytes(self) -> int:
        """Memory in use."""
        return int(self._cached.currsize)

    def encode(self, texts: Iterable[str]) -> tuple[dict[str, Embedding], dict[str, RequestError]]:
        """The embedding of each text, or the error of a text that cannot be encoded."""
        found: dict[str, Embedding] = {}
        missing: list[str] = []
        for text in dict.fromkeys(texts):
            embedding = self._cached.get(text)
            if embedding is None:
                missing.append(text)
            else:
                found[text] = embedding
        failed: dict[str, RequestError] = {}
        for first in range(0, len(missing), MAX_PROMPTS):
            made, errors = isolate(self._forward, missing[first : first + MAX_PROMPTS], name=_name)
            found |= made
            failed |= errors
            for text, embedding in made.items():
                if embedding.size <= self._cached.maxsize:
                    self._cached[text] = embedding
        return found, failed

    def _forward(self, texts: Sequence[str]) -> list[Embedding]:
        """What FluxPipeline's ``encode_prompt`` does, less its looking for adapters and for what was cut off."""
        pipeline, texts = self._pipeline, list(texts)
        clip = self._ids(pipeline.tokenizer, texts, pipeline.tokenizer_max_length)
        pooled = pipeline.text_encoder(move(clip, pipeline.text_encoder.device)).pooler_output
        t5 = self._ids(pipeline.tokenizer_2, texts, self._max_sequence_length)
        tokens = pipeline.text_encoder_2(move(t5, pipeline.text_encoder_2.device))[0]
        # Copies, or one embedding that is kept would keep the whole batch's memory.
        return [Embedding(*pair) for pair in zip(map(torch.clone, tokens), map(torch.clone, pooled), strict=True)]

    @staticmethod
    def _ids(tokenizer: Any, texts: list[str], length: int) -> torch.Tensor:
        """Token ids ``[texts, length]``, padded or cut."""
        ids: torch.Tensor = tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return ids


def _name(text: str) -> str:
    return f"a prompt of {len(text):,} characters"
