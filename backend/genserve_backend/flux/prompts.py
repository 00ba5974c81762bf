"""Prompt encoding: batches of prompts, with a cache of embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from cachetools import LRUCache
from diffusers import FluxPipeline

from genserve_backend.devices import move
from genserve_backend.errors import RequestError
from genserve_backend.flux.lora.adapters import Adapters
from genserve_backend.flux.lora.cache import Combination, Key
from genserve_backend.flux.lora.key_formats import TEXT_ENCODER
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


class AdaptedPrompt(NamedTuple):
    """A prompt for a text encoder with adapters."""

    text: str
    adapters: Combination


Prompt: TypeAlias = str | AdaptedPrompt


def adapted(text: str, adapters: Combination | None) -> Prompt:
    """Return the prompt of an image; only adapters of the text encoder make it another one than the text."""
    return AdaptedPrompt(text, adapters) if adapters and adapters.adapts(TEXT_ENCODER) else text


class PromptEncoder:
    """The two text encoders, with a cache of the latest embeddings.

    Args:
        pipeline: The pipeline with the encoders and tokenizers.
        max_sequence_length: T5 tokens of a prompt.
        cache_bytes: Limit on the device memory of the cache; eviction is least recently used first.
        max_prompts: Prompts in one forward.
        adapters: Adapters of the text encoder, if any are served.
    """

    def __init__(
        self,
        pipeline: FluxPipeline,
        *,
        max_sequence_length: int,
        cache_bytes: int,
        max_prompts: int = MAX_PROMPTS,
        adapters: Adapters | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._max_prompts = max_prompts
        self._adapters = adapters
        # The encoders' weights may be in host memory between two encodings.
        self._device: torch.device = pipeline.transformer.device
        self._max_sequence_length = max_sequence_length
        self._cache: LRUCache[str | tuple[str, Key], Embedding] = LRUCache(
            cache_bytes, getsizeof=lambda embedding: embedding.size
        )

    @property
    def cached_bytes(self) -> int:
        """Device memory that the cache uses."""
        return int(self._cache.currsize)

    def encode(self, prompts: Iterable[Prompt]) -> tuple[dict[Prompt, Embedding], dict[Prompt, RequestError]]:
        """Return the embedding of each prompt, and the errors of those that cannot be encoded."""
        found: dict[Prompt, Embedding] = {}
        missing: list[Prompt] = []
        for prompt in dict.fromkeys(prompts):
            embedding = self._cache.get(_key(prompt))
            if embedding is None:
                missing.append(prompt)
            else:
                found[prompt] = embedding
        failed: dict[Prompt, RequestError] = {}
        for first in range(0, len(missing), self._max_prompts):
            encoded, errors = isolate(self._forward, missing[first : first + self._max_prompts], name=_name)
            found |= encoded
            failed |= errors
            for prompt, embedding in encoded.items():
                if embedding.size <= self._cache.maxsize:
                    self._cache[_key(prompt)] = embedding
        return found, failed

    def _forward(self, prompts: Sequence[Prompt]) -> list[Embedding]:
        """Encode like FluxPipeline's ``encode_prompt``, without its handling of truncated text."""
        pipeline, texts = self._pipeline, list(map(_text, prompts))
        if self._adapters:
            self._adapters.select_texts([None if isinstance(prompt, str) else prompt.adapters for prompt in prompts])
        clip = self._tokenize(pipeline.tokenizer, texts, pipeline.tokenizer_max_length)
        pooled = pipeline.text_encoder(move(clip, self._device)).pooler_output
        t5 = self._tokenize(pipeline.tokenizer_2, texts, self._max_sequence_length)
        tokens = pipeline.text_encoder_2(move(t5, self._device))[0]
        # Copies: a cached view would keep the memory of the whole batch.
        return [Embedding(*pair) for pair in zip(map(torch.clone, tokens), map(torch.clone, pooled), strict=True)]

    @staticmethod
    def _tokenize(tokenizer: Any, texts: list[str], length: int) -> torch.Tensor:
        """Return token ids ``[texts, length]``, padded or truncated."""
        ids: torch.Tensor = tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return ids


def _text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt.text


def _key(prompt: Prompt) -> str | tuple[str, Key]:
    """Return the cache's key, which does not hold the adapters."""
    return prompt if isinstance(prompt, str) else (prompt.text, prompt.adapters.key(TEXT_ENCODER))


def _name(prompt: Prompt) -> str:
    return f"a prompt of {len(_text(prompt)):,} characters"
