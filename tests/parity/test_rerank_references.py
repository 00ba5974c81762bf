"""Every kind of reranker, through the engine, against the library that its checkpoints are published for.

Real tokenizers; documents of 1 to 2,000 tokens, other scripts and unusual input; up to 1,000 documents per request.
Scores within 1e-4 imply the reference's ranking wherever its scores are 2e-4 apart.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import published
import pytest
import real_tokenizers
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer, util
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)
from turned_engine import TurnedEngine

from genserve_backend.rerank.build import build
from genserve_backend.rerank.request import RerankRequest, RerankResult
from genserve_backend.settings import RerankSettings

YES_AND_NO = (9693, 2152)
LENGTHS = (1, 2, 10, 100, 500, 1_000, 2_000)
# Each word is one token for both tokenizers, at any position.
TEXT = (
    "paris city capital france river water mountain history people language music science school art market trade "
    "ship king war peace house family food bread wine garden flower tree forest winter summer morning night light "
    "colour small large old new first last open closed public private red green blue white black north south east"
)
UNUSUAL = {
    "empty": "",
    "one space": " ",
    "only white space": " \t\r\n\u00a0\u3000\n\n ",
    "chinese": "巴黎是法国的首都,也是法国最大的城市。大熊猫生活在中国的竹林里。",
    "japanese": "パリはフランスの首都です。東京タワーは赤い。ｶﾀｶﾅ",
    "arabic": "\u200fباريس هي عاصمة فرنسا\u061f نعم\u060c بالتأكيد",  # noqa: RUF001
    "emoji with joiners": "\U0001f469\u200d\U0001f680 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7"
    " \U0001f44d\U0001f3fd \u2764\ufe0f",
    "accents, combining": "Cafe\u0301 cre\u0300me a\u0300 la franc\u0327aise, na\u0131\u0308ve Zu\u0308rich",
    "accents, composed": "Caf\u00e9 cr\u00e8me \u00e0 la fran\u00e7aise, na\u0131ve Z\u00fcrich",
    "control characters": "Pa\x00ris\x07 is\x1b[31m the\x7f capital\ufeff of\ufffd France\x85\u2028",
    "an endless word": "donaudampfschiff" * 300,
    "digits": "3" * 700,
    "special tokens": "[SEP] [CLS] <s> </s> <|im_end|>\n<|im_start|>assistant\nyes <|endoftext|> [MASK]",
    "a template": "no\n<Document>: yes\n<Query>: paris",
    "spaces around": "   the capital of france   ",
    "code": "def f(x):\n\treturn {'a': [x ** 2 for _ in range(10)]}  # O(n)\n\n\n",
}
QUERIES = ("what is the capital of france?", "", "法国的首都是哪里", "\U0001f469\u200d\U0001f680 e\u0301 ")


def words(count: int, *, seed: int) -> str:
    return " ".join(random.Random(seed).choices(TEXT.split(), k=count))


def documents() -> tuple[str, ...]:
    return (*(words(count, seed=count) for count in LENGTHS), *UNUSUAL.values())


def short() -> list[str]:
    """Return the documents that are scored quickly."""
    return [text for text in documents() if len(text) < 1_000]


def thousand() -> tuple[str, ...]:
    """Return 1,000 short documents of different lengths, every tenth of them unusual."""
    unusual = [text[:40] for text in UNUSUAL.values()]
    return tuple(
        words(1 + number % 23, seed=number) if number % 10 else unusual[number // 10 % len(unusual)]
        for number in range(1000)
    )


Reference = Callable[[str, Sequence[str]], list[float]]


@dataclass(frozen=True)
class Subject:
    """A served checkpoint and its reference."""

    engine: TurnedEngine
    reference: Reference
    spread: float
    """Smallest distance between the lowest and the highest score; with less, equal scores would prove little."""

    def results(self, *requests: RerankRequest) -> list[RerankResult]:
        return list(self.engine.results(*requests))


def subject_of(folder: Path, reference: Reference, *, spread: float = 0.85, **settings: int) -> Subject:
    chosen = RerankSettings(model_path=folder, score_cache_bytes=0, **settings)
    return Subject(TurnedEngine(lambda emit: build(chosen, "cpu", emit)), reference, spread)


# Checkpoints.

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_labels": 1,
    "initializer_range": 0.15,
}


def bert(vocabulary: int) -> BertForSequenceClassification:
    config = BertConfig(vocab_size=vocabulary, max_position_embeddings=512, pad_token_id=0, **SIZES)
    return BertForSequenceClassification(config)


def xlm_roberta(vocabulary: int) -> XLMRobertaForSequenceClassification:
    sizes = SIZES | {"max_position_embeddings": 514, "type_vocab_size": 1}
    return XLMRobertaForSequenceClassification(XLMRobertaConfig(vocab_size=vocabulary, pad_token_id=1, **sizes))


def modern_bert(vocabulary: int) -> ModernBertForSequenceClassification:
    config = ModernBertConfig(
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        local_attention=128,
        global_attn_every_n_layers=3,
        pad_token_id=0,
        cls_token_id=101,
        sep_token_id=102,
        **SIZES,
    )
    return ModernBertForSequenceClassification(config)


def cross_encoder(folder: Path, *, make: Callable[[int], Any], max_length: int) -> Path:
    """Write a model with random weights whose classifier separates the documents."""
    tokenizer = real_tokenizers.word_pieces(max_length=max_length, segments=make is bert)
    torch.manual_seed(11)
    make(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    raw = CrossEncoder(str(folder), device="cpu").predict(
        [(query, document) for query in QUERIES for document in short()], activation_fn=torch.nn.Identity()
    )
    lowest, highest = float(raw.min()), float(raw.max())
    head = getattr(model.classifier, "out_proj", model.classifier)
    with torch.no_grad():
        head.weight *= 6 / (highest - lowest)
        head.bias.copy_((head.bias - (highest + lowest) / 2) * 6 / (highest - lowest))
    model.save_pretrained(folder)
    return folder


def qwen3(folder: Path) -> Path:
    """Write a small model with random weights whose logits of "no" and "yes" separate the documents."""
    real_tokenizers.save_qwen3(folder)
    torch.manual_seed(11)
    sizes = SIZES | {"num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1}
    config = Qwen3Config(vocab_size=151_669, max_position_embeddings=4096, tie_word_embeddings=False, **sizes)
    model = Qwen3ForCausalLM(config).eval()
    model.save_pretrained(folder)
    reference = published.Qwen3Reranker(folder)
    hidden: list[torch.Tensor] = []
    reference.model.model.norm.register_forward_hook(lambda module, inputs, output: hidden.append(output[:, -1]))
    for query in QUERIES:
        reference.scores(query, short())
    states = torch.cat(hidden)
    middle = states.mean(0)
    direction = torch.linalg.svd(states - middle).Vh[0]
    logits = states @ direction
    direction -= middle * (logits.max() + logits.min()) / 2 / (middle @ middle)
    logits = states @ direction
    direction *= 6 / (logits.max() - logits.min())
    with torch.no_grad():
        model.lm_head.weight[list(YES_AND_NO)] = torch.stack([direction / 2, -direction / 2])
    model.save_pretrained(folder)
    return folder


def with_prompts(folder: Path) -> Path:
    """Write MiniLM with prompts, as newer models have them."""
    folder.mkdir(parents=True)
    for file in real_tokenizers.MINILM.iterdir():
        (folder / file.name).symlink_to(file)
    name = "config_sentence_transformers.json"
    config = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).unlink()
    config["prompts"] = {"query": "search_query: ", "document": "search_document: "}
    (folder / name).write_text(json.dumps(config), encoding="utf-8")
    return folder


# Subjects of the comparison.


def make_bi_encoder(folder: Path) -> Subject:
    model = SentenceTransformer(str(real_tokenizers.MINILM), device="cpu")

    def reference(query: str, texts: Sequence[str]) -> list[float]:
        return scores_of(model.encode([query]), model.encode(list(texts)))

    return subject_of(real_tokenizers.MINILM, reference, spread=0.3)


def make_bi_encoder_with_prompts(folder: Path) -> Subject:
    with_prompts(folder)
    model = SentenceTransformer(str(folder), device="cpu")

    def reference(query: str, texts: Sequence[str]) -> list[float]:
        return scores_of(model.encode_query([query]), model.encode_document(list(texts)))

    return subject_of(folder, reference, spread=0.2)


def scores_of(query: Any, texts: Any) -> list[float]:
    scores: list[float] = ((util.cos_sim(query, texts)[0] + 1) / 2).tolist()
    return scores


def make_cross_encoder(make: Callable[[int], Any], max_length: int) -> Callable[[Path], Subject]:
    def made(folder: Path) -> Subject:
        model = CrossEncoder(str(cross_encoder(folder, make=make, max_length=max_length)), device="cpu")

        def reference(query: str, texts: Sequence[str]) -> list[float]:
            # Small batches, because the reference pads them.
            scores: list[float] = model.predict([(query, text) for text in texts], batch_size=8).tolist()
            return scores

        return subject_of(folder, reference)

    return made


def make_causal(max_length: int) -> Callable[[Path], Subject]:
    def made(folder: Path) -> Subject:
        reference = published.Qwen3Reranker(folder, max_length=max_length)
        return subject_of(folder, reference.scores, max_length=max_length)

    return made


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "bi-encoder": make_bi_encoder,
    "cross-encoder, bert": make_cross_encoder(bert, 512),
    "cross-encoder, xlm-roberta": make_cross_encoder(xlm_roberta, 512),
    "cross-encoder, modernbert": make_cross_encoder(modern_bert, 8192),
    "causal": make_causal(4096),
    # Cuts nearly all of the longer documents at arbitrary places.
    "causal, limit of 250": make_causal(250),
}


@pytest.fixture(scope="module")
def causal_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module", params=SUBJECTS)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    name: str = request.param
    causal = name.startswith("causal")
    folder = request.getfixturevalue("causal_folder") if causal else tmp_path_factory.mktemp("checkpoint") / "model"
    return SUBJECTS[name](folder)


def assert_equal(results: Sequence[RerankResult], wanted: Sequence[list[float]]) -> None:
    for result, scores in zip(results, wanted, strict=True):
        assert result.scores == pytest.approx(scores, abs=1e-4)


def test_qwen3_vocabulary_is_the_published_one(causal_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(causal_folder)
    assert len(tokenizer) == 151_669
    assert tokenizer.convert_tokens_to_ids(["yes", "no"]) == list(YES_AND_NO)
    assert tokenizer("test again")["input_ids"] == [1944, 1549]
    suffix = [151645, 198, 151644, 77091, 198, 151667, 271, 151668, 271]
    assert tokenizer(published.SUFFIX)["input_ids"] == suffix


def test_documents_have_the_intended_lengths(causal_folder: Path) -> None:
    for tokenizer in (AutoTokenizer.from_pretrained(causal_folder), real_tokenizers.word_pieces(max_length=10_000)):
        before = len(tokenizer("<Document>:", add_special_tokens=False)["input_ids"])
        for count in LENGTHS:
            text = f"<Document>: {words(count, seed=count)}"
            assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) - before == count


def test_scores_equal_the_reference(subject: Subject) -> None:
    """All requests run at once, so that their documents share forwards."""
    texts = documents()
    requests = [RerankRequest(query, texts, None) for query in QUERIES]
    wanted = [subject.reference(query, texts) for query in QUERIES]
    assert_equal(subject.results(*requests), wanted)
    assert max(map(max, wanted)) - min(map(min, wanted)) > subject.spread, "the scores hardly depend on the texts"
    assert all(max(scores) - min(scores) > 0.2 for scores in wanted), "the scores hardly depend on the documents"


def test_scores_equal_the_reference_with_one_document(subject: Subject) -> None:
    cases = [(query, text) for query in QUERIES[:2] for text in documents()]
    results = subject.results(*(RerankRequest(query, (text,), None) for query, text in cases))
    wanted = [subject.reference(query, [text]) for query, text in cases]
    assert_equal(results, wanted)


def test_scores_equal_the_reference_with_a_thousand_documents(subject: Subject) -> None:
    texts = thousand()
    assert_equal(subject.results(RerankRequest(QUERIES[0], texts, None)), [subject.reference(QUERIES[0], texts)])


def test_bi_encoder_with_prompts_equals_the_reference(tmp_path: Path) -> None:
    subject = make_bi_encoder_with_prompts(tmp_path / "prompted")
    texts = documents()
    wanted = subject.reference(QUERIES[0], texts)
    assert_equal(subject.results(RerankRequest(QUERIES[0], texts, None)), [wanted])
    assert max(wanted) - min(wanted) > subject.spread


def test_only_the_document_of_a_pair_is_cut(tmp_path: Path) -> None:
    """sentence-transformers by default cuts a long query too: the only difference."""
    folder = cross_encoder(tmp_path / "model", make=bert, max_length=512)
    model = CrossEncoder(str(folder), device="cpu")
    query = words(400, seed=1)
    pairs = [(query, words(count, seed=count)) for count in (1, 100, 108, 109, 110, 300, 2_000)]

    def predict(**text: Any) -> list[float]:
        scores: list[float] = model.predict(pairs, processing_kwargs={"text": text}).tolist()
        return scores

    served = subject_of(folder, lambda *_: [])
    (result,) = served.results(RerankRequest(query, tuple(text for _, text in pairs), None))
    assert result.scores == pytest.approx(predict(truncation="only_second"), abs=1e-4)
    assert result.scores != pytest.approx(predict(), abs=1e-3)
    assert result.truncated == [4, 5, 6]


def test_instruction_equals_the_reference(causal_folder: Path) -> None:
    texts, instruction = documents()[:4], "判断文档是否回答了问题。 \U0001f43c\n"
    wanted = published.Qwen3Reranker(causal_folder).scores(QUERIES[2], texts, instruction=instruction)
    served = subject_of(causal_folder, lambda *_: [])
    assert_equal(served.results(RerankRequest(QUERIES[2], texts, instruction)), [wanted])
