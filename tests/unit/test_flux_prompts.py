"""Prompt encoding: parity with FluxPipeline, batches, cache and failures."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

from genserve_backend.errors import OutOfMemory, RequestError, ServerError
from genserve_backend.flux.build import load_pipeline
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.prompts import MAX_PROMPTS, Embedding, PromptEncoder
from genserve_backend.settings import FluxSettings
from random_flux import write_random_flux

PLENTY = 2**30
LENGTH = 64
TEXTS = {
    "short": "a cat",
    "blank": " ",
    "long": "a castle on a hill above the river, " * 280,
    "one-long-word": "x" * 10_000,
    "chinese": "\u4e00\u53ea\u732b\u5728\u6c99\u53d1\u4e0a",
    "emoji": "\U0001f600 party \U0001f469\u200d\U0001f680",
    "long-unicode": "\u7ea2\u8272 \U0001f534 " * 100,
    "control-characters": "a\x00b\r\n\tc",
    "decomposed": "cafe\u0301 \ufb01sh",
}
NOT_UTF8 = "a lone surrogate \ud800"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> FluxPipeline:
    path = tmp_path_factory.mktemp("prompts") / "dev"
    write_random_flux(path)
    checkpoint = FluxCheckpoint.load(path)
    assert checkpoint.max_sequence_length == LENGTH
    return load_pipeline(checkpoint, FluxSettings(model_path=path), "cpu")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def forwards(pipeline: FluxPipeline) -> Iterator[list[int]]:
    """Return the batch sizes of T5's forwards."""
    sizes: list[int] = []
    handle = pipeline.text_encoder_2.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    yield sizes
    handle.remove()


def encoder(pipeline: FluxPipeline, *, cache_bytes: int = PLENTY) -> PromptEncoder:
    return PromptEncoder(pipeline, max_sequence_length=LENGTH, cache_bytes=cache_bytes)


def encode(prompts: PromptEncoder, *texts: str) -> dict[str, Embedding]:
    found, failed = prompts.encode(texts)
    assert failed == {}
    assert found.keys() == set(texts)
    return found


def is_reference(pipeline: FluxPipeline, text: str, embedding: Embedding) -> bool:
    tokens, pooled, _ = pipeline.encode_prompt(text, max_sequence_length=LENGTH)
    assert embedding.tokens.shape == tokens.shape[1:]
    assert embedding.pooled.shape == pooled.shape[1:]
    return torch.allclose(embedding.tokens, tokens[0], atol=1e-5) and torch.allclose(
        embedding.pooled, pooled[0], atol=1e-5
    )


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_embedding_equals_diffusers(pipeline: FluxPipeline, text: str) -> None:
    assert is_reference(pipeline, text, encode(encoder(pipeline), text)[text])


def test_batched_texts_do_not_mix(pipeline: FluxPipeline) -> None:
    found = encode(encoder(pipeline), *TEXTS.values())
    assert all(is_reference(pipeline, text, embedding) for text, embedding in found.items())
    assert not is_reference(pipeline, "a dog", found["a cat"])


def test_no_texts_need_no_forward(pipeline: FluxPipeline, forwards: list[int]) -> None:
    assert encoder(pipeline).encode([]) == ({}, {})
    assert forwards == []


def test_text_is_encoded_once(pipeline: FluxPipeline, forwards: list[int]) -> None:
    prompts = encoder(pipeline)
    first = encode(prompts, "a", "b", "a")
    assert forwards == [2]
    again = encode(prompts, "b", "c")
    assert forwards == [2, 1]
    assert torch.equal(again["b"].tokens, first["b"].tokens)
    assert torch.equal(again["b"].pooled, first["b"].pooled)
    encode(prompts, "a", "b", "c")
    assert forwards == [2, 1]


def test_whitespace_makes_texts_different(pipeline: FluxPipeline, forwards: list[int]) -> None:
    encode(encoder(pipeline), "a cat", "a cat ")
    assert forwards == [2]


def test_forwards_have_a_limited_size(pipeline: FluxPipeline, forwards: list[int]) -> None:
    texts = [f"cat number {index}" for index in range(2 * MAX_PROMPTS + 3)]
    found = encode(encoder(pipeline), *texts)
    assert forwards == [MAX_PROMPTS, MAX_PROMPTS, 3]
    assert is_reference(pipeline, texts[0], found[texts[0]])
    assert is_reference(pipeline, texts[-1], found[texts[-1]])


def size_of_one(pipeline: FluxPipeline) -> int:
    return encode(encoder(pipeline), "a")["a"].size


def test_least_recently_used_is_evicted_first(pipeline: FluxPipeline, forwards: list[int]) -> None:
    prompts = encoder(pipeline, cache_bytes=3 * size_of_one(pipeline))
    encode(prompts, "a", "b", "c")
    encode(prompts, "a")
    encode(prompts, "d")
    forwards.clear()
    encode(prompts, "a", "c", "d")
    assert forwards == []
    encode(prompts, "b")
    assert forwards == [1]
    encode(prompts, "c", "d")
    assert forwards == [1]
    encode(prompts, "a")
    assert forwards == [1, 1]


@pytest.mark.parametrize("room", [0.0, 0.99, 1.0, 2.5, 5.0], ids=lambda room: f"room-for-{room}")
def test_cache_stays_within_its_bytes(pipeline: FluxPipeline, forwards: list[int], room: float) -> None:
    limit = int(room * size_of_one(pipeline))
    prompts = encoder(pipeline, cache_bytes=limit)
    draw = random.Random(0)
    for _ in range(15):
        texts = draw.sample("abcdefghij", draw.randint(1, 4))
        found = encode(prompts, *texts)
        assert all(is_reference(pipeline, text, embedding) for text, embedding in found.items())
        assert 0 <= prompts.cached_bytes <= limit
    assert prompts.cached_bytes == int(room) * size_of_one(pipeline)


def test_without_a_cache_every_text_is_encoded(pipeline: FluxPipeline, forwards: list[int]) -> None:
    prompts = encoder(pipeline, cache_bytes=0)
    encode(prompts, "a", "b")
    encode(prompts, "a", "b")
    assert forwards == [2, 2]
    assert prompts.cached_bytes == 0


def test_cached_embedding_holds_only_its_own_memory(pipeline: FluxPipeline) -> None:
    for embedding in encode(encoder(pipeline), *"abcdef").values():
        held = embedding.tokens.untyped_storage().nbytes() + embedding.pooled.untyped_storage().nbytes()
        assert held == embedding.size


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (RuntimeError("secret"), ServerError, "RuntimeError in the engine"),
        (torch.OutOfMemoryError("secret"), OutOfMemory, "a prompt of 5 characters does not fit"),
    ],
    ids=["defect", "out-of-memory"],
)
def test_failing_text_fails_alone(
    pipeline: FluxPipeline, forwards: list[int], raised: Exception, kind: type[RequestError], message: str
) -> None:
    bad = pipeline.tokenizer_2("a bad", padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids[0]

    def refuse(_: Any, inputs: tuple[torch.Tensor]) -> None:
        if any(torch.equal(row, bad) for row in inputs[0]):
            raise raised

    prompts = encoder(pipeline)
    handle = pipeline.text_encoder_2.register_forward_pre_hook(refuse)
    try:
        found, failed = prompts.encode(["a", "b", "a bad", "c", "d"])
    finally:
        handle.remove()
    assert all(is_reference(pipeline, text, embedding) for text, embedding in found.items())
    assert found.keys() == set("abcd")
    (error,) = failed.values()
    assert "a bad" in failed
    assert type(error) is kind
    assert message in str(error)
    assert "secret" not in str(error)

    forwards.clear()
    encode(prompts, "a", "b", "c", "d")
    assert forwards == []
    encode(prompts, "a bad")
    assert forwards == [1]


def test_text_that_cannot_be_tokenized_fails_alone(pipeline: FluxPipeline) -> None:
    found, failed = encoder(pipeline).encode(["a", NOT_UTF8, "b"])
    assert found.keys() == {"a", "b"}
    assert failed.keys() == {NOT_UTF8}
    assert type(failed[NOT_UTF8]) is ServerError
