"""Prompts of causal rerankers are those of the whole text, though their instruction and query are tokenized once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import real_tokenizers
import tiny_models
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.scorers.prompts import DEFAULT_INSTRUCTION, PREFIX, SUFFIX, Prompts

PIECES = (
    *("panda", "Panda's", " ", "  ", "\n", "\r\n", "\t", "<", ">", ":", "Document", "<Document>: "),
    *(
        "<|im_end|>",
        "1",
        "123",
        "é",
        "e\u0301",
        "\u0301",
        "ß",
        "巴黎",
        "。",
        "\u200d",
        "\U0001f43c",
        "...",
        "'s",
        "_",
        "</think>",
    ),
)


class Counting:
    """A tokenizer that counts the characters given to it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.characters = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.characters += sum(map(len, texts))
        return self._tokenizer(texts, **options)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("qwen")
    real_tokenizers.save_qwen3(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> RerankCheckpoint:
    return RerankCheckpoint.load(tiny_models.qwen3_causal(tmp_path_factory.mktemp("causal") / "model"))


def prompts(checkpoint: RerankCheckpoint, tokenizer: Any) -> Prompts:
    return Prompts(checkpoint, config=object(), tokenizer=tokenizer, max_length=8192, shares=True)


def text(draw: random.Random) -> str:
    return "".join(draw.choices(PIECES, k=draw.randint(0, 12)))


@pytest.mark.parametrize("seed", range(20))
def test_prompts_equal_those_of_the_whole_text(seed: int, qwen: Any, checkpoint: RerankCheckpoint) -> None:
    draw = random.Random(seed)
    made = prompts(checkpoint, qwen)
    for _ in range(20):
        instruction, query = draw.choice([None, text(draw) or None]), text(draw) or " "
        request = RerankRequest(query, tuple(text(draw) for _ in range(5)), instruction)
        found = [sequence.ids for part in made.tokenize(request) for sequence in part.sequences]
        head = f"<Instruct>: {instruction or DEFAULT_INSTRUCTION}\n<Query>: {query}\n<Document>: "
        ends = [qwen(each, add_special_tokens=False)["input_ids"] for each in (PREFIX, SUFFIX)]
        for ids, document in zip(found, request.documents, strict=True):
            assert ids == ends[0] + qwen(head + document, add_special_tokens=False)["input_ids"] + ends[1]


def test_instruction_and_query_are_tokenized_once(qwen: Any, checkpoint: RerankCheckpoint) -> None:
    counting = Counting(qwen)
    made = prompts(checkpoint, counting)
    request = RerankRequest("q" * 500, ("document",) * 100, "i" * 300)
    list(made.tokenize(request))
    counting.characters = 0
    list(made.tokenize(request))
    head, repeated = 840, 100 * len("<Document>: document")
    assert counting.characters < 2 * head + repeated, "the template and the instruction are not tokenized again"


def test_tokenizer_without_words_gets_the_whole_text(checkpoint: RerankCheckpoint, tmp_path: Path) -> None:
    real_tokenizers.save_qwen3(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    # One word per text: a token may span any two characters.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    counting = Counting(tokenizer)
    made = prompts(checkpoint, counting)
    counting.characters = 0
    request = RerankRequest("query", ("a", "b"), "instruction")
    found = [sequence.ids for part in made.tokenize(request) for sequence in part.sequences]
    head = "<Instruct>: instruction\n<Query>: query\n<Document>: "
    assert counting.characters > 2 * len(head)
    for ids, document in zip(found, request.documents, strict=True):
        body = tokenizer(head + document, add_special_tokens=False)["input_ids"]
        assert ids[-len(body) - len(made._suffix) : -len(made._suffix)] == body
