"""Load of the reranker's comparisons: models with random weights, and requests that all come at once."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
)

QUERY_TOKENS = 10
CHAT_WORDS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<Instruct>", "<Query>", "<Document>")
"""Single tokens of a causal reranker's prompt: added to another tokenizer, they keep the prompt's length realistic."""


@dataclass(frozen=True)
class Request:
    """One query with its documents."""

    query: str
    documents: tuple[str, ...]


@dataclass(frozen=True)
class Load:
    """Requests of one run, the same for every contender."""

    requests: tuple[Request, ...]

    @property
    def pairs(self) -> int:
        """Return the number of pairs of query and document."""
        return sum(len(request.documents) for request in self.requests)

    def to_json(self) -> str:
        """Serialize for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Load:
        """Parse the output of `to_json`."""
        requests = json.loads(text)["requests"]
        return cls(tuple(Request(each["query"], tuple(each["documents"])) for each in requests))


def draw_load(checkpoint: Path, *, requests: int, documents: int, tokens: tuple[int, int], seed: int = 0) -> Load:
    """Draw requests; each document has a random length in the range `tokens`, in words of one token each."""
    rng = random.Random(seed)
    vocabulary = AutoTokenizer.from_pretrained(checkpoint).get_vocab()
    words = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 2)

    def text(count: int) -> str:
        return " ".join(rng.choices(words, k=count))

    return Load(
        tuple(
            Request(text(QUERY_TOKENS), tuple(text(rng.randint(*tokens)) for _ in range(documents)))
            for _ in range(requests)
        )
    )


def write_cross_encoder(source: Path, folder: Path) -> None:
    """Write a cross-encoder with the shape and tokenizer of the bi-encoder in `source` and with random weights."""
    config = BertConfig.from_pretrained(source, num_labels=1)
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def write_causal(source: Path, folder: Path) -> None:
    """Write a Qwen3 with eight layers of width 512, random weights, and the tokenizer in `source` with `CHAT_WORDS`."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(list(CHAT_WORDS))
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=1536,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Timing:
    """Times and scores of one run."""

    seconds: float
    latencies: list[float]
    """Seconds of each request."""
    scores: list[list[float]]
    """Scores of each request, in the order of its documents."""

    @property
    def pairs_per_second(self) -> float:
        """Return the rate over the whole run."""
        return sum(map(len, self.scores)) / self.seconds

    @property
    def median_latency(self) -> float:
        """Return seconds."""
        return statistics.median(self.latencies)

    def to_json(self) -> str:
        """Serialize for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Timing:
        """Parse the output of `to_json`."""
        return cls(**json.loads(text))


def drive(call: Callable[[Request], Sequence[float]], load: Load, *, warm_up: int = 4) -> Timing:
    """Send all requests at once, after a warm-up of a few."""
    for request in load.requests[:warm_up]:
        call(Request(f"{request.query} again", request.documents))

    def one(request: Request) -> tuple[float, list[float]]:
        started = time.monotonic()
        scores = list(call(request))
        return time.monotonic() - started, scores

    with ThreadPoolExecutor(len(load.requests)) as callers:
        started = time.monotonic()
        answers: list[Any] = list(callers.map(one, load.requests))
        seconds = time.monotonic() - started
    return Timing(seconds, [latency for latency, _ in answers], [scores for _, scores in answers])
