"""Every kind of reranker, through the engine, against plain transformers: one pair at a time, without padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import published
import pytest
import tiny_models
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from turned_engine import TurnedEngine, count

from genserve_backend.checkpoints import CheckpointError
from genserve_backend.rerank.build import build
from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.metrics import PREFIX_TOKENS_SAVED, TOKENS
from genserve_backend.rerank.request import RerankRequest, RerankResult
from genserve_backend.rerank.scorers import base, build_scorer
from genserve_backend.settings import RerankSettings

QUERY = "What is the capital of France?"
TOO_LONG = 3
DOCUMENTS = (
    "Paris is the capital of France.",
    "",
    "巴黎是法国的首都。大熊猫吃竹子。",
    "The giant panda eats bamboo. " * 200,
    "no",
    "Berlin \U0001f43c\U0001f1eb\U0001f1f7 \U0001f469\u200d\U0001f680 e\u0301",
    "  \n\t ",
    "Berlin is the capital of Germany, and yes, the giant panda lives in China.",
)
LIMITS = ((1, 1), (3, 150), (256, 16_384))

Reference = Callable[[Path, str, str], float]


def bi_encoder_reference(folder: Path, query: str, document: str, *, pooling: str = "mean") -> float:
    """Return (cosine + 1) / 2 of two embeddings, the texts cut to 48 tokens."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def embed(text: str) -> torch.Tensor:
        with torch.no_grad():
            inputs = tokenizer(text, truncation=True, max_length=48, return_tensors="pt")
            hidden: torch.Tensor = model(**inputs).last_hidden_state[0]
        return {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.amax(0), "lasttoken": hidden[-1]}[pooling]

    cosine = torch.nn.functional.cosine_similarity(embed(query), embed(document), dim=0)
    return float((cosine + 1) / 2)


def cross_encoder_reference(folder: Path, query: str, document: str) -> float:
    """Return the sigmoid of the logit, the document cut so that the pair has 64 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    # Lists of one, because the tokenizer treats an empty document outside a list as no document.
    inputs = tokenizer([query], [document], truncation="only_second", max_length=64, return_tensors="pt")
    with torch.no_grad():
        return float(model(**inputs).logits[0, 0].sigmoid())


def causal_reference(folder: Path, query: str, document: str, *, instruction: str = published.INSTRUCTION) -> float:
    """Return the score of Qwen3-Reranker's model card, with the whole vocabulary and a limit of 512 tokens."""
    (score,) = published.Qwen3Reranker(folder, max_length=512).scores(query, [document], instruction=instruction)
    return score


MODELS: dict[str, tuple[Callable[[Path], Path], Reference]] = {
    "bi-encoder": (tiny_models.bert_bi_encoder, bi_encoder_reference),
    "cross-encoder": (tiny_models.bert_cross_encoder, cross_encoder_reference),
    "cross-encoder with offset positions": (tiny_models.roberta_cross_encoder, cross_encoder_reference),
    "cross-encoder with local attention": (tiny_models.modern_bert_cross_encoder, cross_encoder_reference),
    "causal": (tiny_models.qwen3_causal, causal_reference),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("rerankers")
    return {name: make(root / name.replace(" ", "-")) for name, (make, _) in MODELS.items()}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, list[float]]:
    return {
        name: [reference(folders[name], QUERY, document) for document in DOCUMENTS]
        for name, (_, reference) in MODELS.items()
    }


def rerank(
    folder: Path,
    *,
    query: str = QUERY,
    documents: tuple[str, ...] = DOCUMENTS,
    instruction: str | None = None,
    **settings: int,
) -> RerankResult:
    engine = TurnedEngine(lambda emit: build(RerankSettings(model_path=folder, **settings), "cpu", emit))
    result: RerankResult
    (result,) = engine.results(RerankRequest(query, documents, instruction))
    return result


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_scores_equal_plain_transformers_for_any_batch_limits(
    name: str,
    limits: tuple[int, int],
    packed: bool,
    folders: dict[str, Path],
    expected: dict[str, list[float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not packed:
        monkeypatch.setattr(base, "can_pack", lambda model: False)
    result = rerank(folders[name], max_num_seqs=limits[0], max_num_batched_tokens=limits[1])
    assert result.scores == pytest.approx(expected[name], abs=1e-4)
    assert result.truncated == [TOO_LONG]
    assert max(result.scores) - min(result.scores) > 0.01, "the checkpoint does not tell the documents apart"


@pytest.mark.parametrize("pooling", ["cls", "max", "lasttoken"])
def test_scores_of_each_pooling_equal_plain_transformers(pooling: str, tmp_path: Path) -> None:
    folder = tiny_models.bert_bi_encoder(tmp_path, pooling=pooling)
    wanted = [bi_encoder_reference(folder, QUERY, document, pooling=pooling) for document in DOCUMENTS]
    assert rerank(folder, max_num_seqs=3).scores == pytest.approx(wanted, abs=1e-4)


def test_bi_encoder_prompts_are_applied(tmp_path: Path) -> None:
    folder = tiny_models.bert_bi_encoder(tmp_path)
    prompts = {"query": "query: ", "passage": "a document: ", "document": ""}
    tiny_models.write_json(folder / "config_sentence_transformers.json", {"prompts": prompts})
    wanted = [bi_encoder_reference(folder, f"query: {QUERY}", f"a document: {document}") for document in DOCUMENTS]
    assert rerank(folder).scores == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("name", ["cross-encoder", "cross-encoder with offset positions"])
def test_query_that_leaves_room_for_one_token_is_not_cut(name: str, folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    query = ""
    while len(tokenizer(f"{query} a", "a")["input_ids"]) <= 64:
        query += " a"
    result = rerank(folders[name], query=query, documents=("a", "France France"))
    wanted = [cross_encoder_reference(folders[name], query, document) for document in ("a", "France France")]
    assert result.scores == pytest.approx(wanted, abs=1e-4)
    assert result.truncated == [1]


@pytest.mark.parametrize("name", MODELS)
def test_query_beyond_the_limit_is_scored(name: str, folders: dict[str, Path]) -> None:
    result = rerank(folders[name], query="capital of France " * 500, documents=("Paris", "a panda", ""))
    assert all(0 <= score <= 1 for score in result.scores)
    if name != "causal":
        assert result.truncated == []
        assert result.scores[0] != pytest.approx(result.scores[1], abs=1e-6), "the documents have no effect"


@pytest.mark.parametrize("name", MODELS)
def test_max_length_lowers_the_limit_and_never_raises_it(name: str, folders: dict[str, Path]) -> None:
    assert rerank(folders[name], max_length=100_000).scores == pytest.approx(rerank(folders[name]).scores, abs=1e-6)
    lower = {"causal": 300, "bi-encoder": 12}.get(name, 24)
    result = rerank(folders[name], max_length=lower, documents=("yes", "no", "the capital of Germany " * 40))
    assert result.truncated == [2]
    assert result.tokens <= (4 if name == "bi-encoder" else 3) * lower


@pytest.mark.parametrize("name", MODELS)
def test_limit_below_the_special_tokens_is_rejected(name: str, folders: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="leaves no room"):
        rerank(folders[name], max_length=2)


def test_tokens_counts_the_tokens_of_all_sequences(folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["cross-encoder"])
    wanted = sum(
        len(ids)
        for ids in tokenizer([QUERY] * len(DOCUMENTS), list(DOCUMENTS), truncation="only_second", max_length=64)[
            "input_ids"
        ]
    )
    assert rerank(folders["cross-encoder"]).tokens == wanted


def test_instruction_reaches_the_causal_prompt(folders: dict[str, Path]) -> None:
    documents = DOCUMENTS[:2]
    result = rerank(folders["causal"], documents=documents, instruction="Find the capital")
    wanted = [
        causal_reference(folders["causal"], QUERY, document, instruction="Find the capital") for document in documents
    ]
    assert result.scores == pytest.approx(wanted, abs=1e-4)
    own = rerank(folders["causal"], documents=documents)
    assert rerank(folders["causal"], documents=documents, instruction="").scores == own.scores
    assert result.scores != pytest.approx(own.scores, abs=1e-4)


def test_shared_prefixes_save_tokens_and_change_no_score(folders: dict[str, Path]) -> None:
    def run(prefix_cache_bytes: int) -> tuple[TurnedEngine, list[list[float]]]:
        settings = RerankSettings(
            model_path=folders["causal"], prefix_cache_bytes=prefix_cache_bytes, score_cache_bytes=0
        )
        engine = TurnedEngine(lambda emit: build(settings, "cpu", emit))
        requests = [RerankRequest(query, DOCUMENTS, None) for query in (QUERY, "giant panda", QUERY, " ")]
        scores = [result.scores for result in engine.results(*requests)]
        heartbeats = len(engine.heartbeats)
        engine.turn_until(lambda: len(engine.heartbeats) > heartbeats)  # for the heartbeat that counts the last forward
        return engine, scores

    engine, shared = run(2**20)
    plain_engine, plain = run(0)
    for one, other in zip(shared, plain, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    saved = count(engine.heartbeats, PREFIX_TOKENS_SAVED)
    assert saved > 3 * len(DOCUMENTS) * 50, "the template alone has more tokens"
    assert count(plain_engine.heartbeats, PREFIX_TOKENS_SAVED) == 0
    assert count(engine.heartbeats, TOKENS) + saved == count(plain_engine.heartbeats, TOKENS)


def test_causal_model_without_yes_token_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no token of"):
        rerank(tiny_models.qwen3_causal(tmp_path, answers=False))


def test_missing_weights_are_rejected(tmp_path: Path) -> None:
    folder = tiny_models.bert_cross_encoder(tmp_path)
    encoder = AutoModel.from_pretrained(folder)
    config = (folder / "config.json").read_text(encoding="utf-8")
    encoder.save_pretrained(folder)
    (folder / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"lack 2 tensors, classifier\.bias"):
        rerank(folder)


@pytest.mark.parametrize("windows", [1, 3], ids=["cut", "windows"])
@pytest.mark.parametrize("kind", MODELS, ids=str)
def test_slices_count_exactly_the_characters_of_the_documents(
    kind: str, windows: int, folders: dict[str, Path]
) -> None:
    """Query, template and prompts do not count."""
    settings = RerankSettings(model_path=folders[kind])
    scorer = build_scorer(RerankCheckpoint.load(folders[kind]), settings, "cpu")
    request = RerankRequest(QUERY, DOCUMENTS * 30, None, windows)
    slices = list(scorer.tokenize(request))
    assert len(slices) > 1
    assert sum(part.characters for part in slices) == sum(map(len, request.documents))
    assert all(part.characters >= 0 for part in slices)
