"""Checkpoint folders: the kind of reranker and its length limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from genserve_backend.checkpoints import CheckpointError
from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.sentence_transformers import EmbeddingOptions

BERT = {"architectures": ["BertModel"], "model_type": "bert", "max_position_embeddings": 512, "pad_token_id": 0}
ROBERTA: dict[str, Any] = {"model_type": "xlm-roberta", "max_position_embeddings": 514, "pad_token_id": 1}
MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}
NO_LIMIT = 1000000000000000019884624838656


def folder(root: Path, config: dict[str, Any] | None = None, **files: Any) -> Path:
    """A checkpoint folder with an empty weights file. `files` are JSON files; "__" in a name stands for "/"."""
    path = root / "some-reranker"
    path.mkdir()
    (path / "model.safetensors").touch()
    for name, value in {"config": config, **files}.items():
        if value is not None:
            target = path / f"{name.replace('__', '/')}.json"
            target.parent.mkdir(exist_ok=True)
            target.write_text(json.dumps(value), encoding="utf-8")
    return path


def modules(*kinds: str, package: str = "sentence_transformers.models") -> list[dict[str, Any]]:
    return [
        {"idx": index, "name": str(index), "path": f"{index}_{kind}" if index else "", "type": f"{package}.{kind}"}
        for index, kind in enumerate(kinds)
    ]


def bi_encoder(root: Path, config: dict[str, Any] = BERT, pooling: dict[str, Any] = MEAN, **files: Any) -> Path:
    listed = {"modules": modules("Transformer", "Pooling", "Normalize"), "1_Pooling__config": pooling}
    return folder(root, config, **{**listed, **files})


def labelled(name: str = "BertForSequenceClassification", **config: Any) -> dict[str, Any]:
    return {**BERT, "architectures": [name], "id2label": {"0": "LABEL_0"}, **config}


def test_bi_encoder_is_detected_with_its_options(tmp_path: Path) -> None:
    path = bi_encoder(
        tmp_path,
        sentence_bert_config={"max_seq_length": 256, "do_lower_case": True},
        tokenizer_config={"model_max_length": 128},
        config_sentence_transformers={"prompts": {"query": "query: ", "document": "passage: "}},
    )
    found = RerankCheckpoint.load(path)
    assert (found.path, found.kind, found.name, found.max_length) == (path, "bi-encoder", "some-reranker", 256)
    assert found.embedding == EmbeddingOptions("mean", "query: ", "passage: ", lowercase=True, max_length=256)


@pytest.mark.parametrize(
    ("pooling", "mode"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode": "cls", "embedding_dimension": 8}, "cls"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({"word_embedding_dimension": 8}, "mean"),
    ],
    ids=str,
)
def test_pooling_is_detected(pooling: dict[str, Any], mode: str, tmp_path: Path) -> None:
    options = RerankCheckpoint.load(bi_encoder(tmp_path, pooling=pooling)).embedding
    assert options is not None
    assert options.pooling == mode


@pytest.mark.parametrize(
    "pooling",
    [{"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, {"pooling_mode": "weightedmean"}],
    ids=str,
)
def test_unsupported_pooling_is_rejected(pooling: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="served is one of cls, mean, max, lasttoken"):
        RerankCheckpoint.load(bi_encoder(tmp_path, pooling=pooling))


def test_newer_module_names_are_accepted(tmp_path: Path) -> None:
    package = "sentence_transformers.sentence_transformer.modules.some_file"
    path = bi_encoder(tmp_path, modules=modules("Transformer", "Pooling", package=package))
    assert RerankCheckpoint.load(path).kind == "bi-encoder"


def test_model_in_a_subfolder_is_found(tmp_path: Path) -> None:
    listed = modules("Transformer", "Pooling")
    listed[0]["path"] = "0_Transformer"
    files: dict[str, Any] = {"0_Transformer__config": BERT, "1_Pooling__config": MEAN}
    path = folder(tmp_path, modules=listed, **files)
    (path / "model.safetensors").rename(path / "0_Transformer" / "model.safetensors")
    assert RerankCheckpoint.load(path).path == path / "0_Transformer"


def test_embedding_model_with_a_causal_base_is_a_bi_encoder(tmp_path: Path) -> None:
    config = {"architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 32768}
    found = RerankCheckpoint.load(bi_encoder(tmp_path, config, {"pooling_mode_lasttoken": True}))
    assert (found.kind, found.max_length) == ("bi-encoder", 32768)


def test_cross_encoder_is_detected_with_or_without_modules(tmp_path: Path) -> None:
    plain = RerankCheckpoint.load(folder(tmp_path, labelled(), tokenizer_config={"model_max_length": 384}))
    assert (plain.kind, plain.max_length, plain.embedding) == ("cross-encoder", 384, None)
    (tmp_path / "newer").mkdir()
    newer = folder(tmp_path / "newer", labelled(), modules=modules("Transformer"))
    assert RerankCheckpoint.load(newer).kind == "cross-encoder"


@pytest.mark.parametrize(
    ("labels", "count"),
    [
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, 3),
        ({"id2label": None, "num_labels": 5}, 5),
        ({"id2label": None}, 2),
    ],
)
def test_cross_encoder_with_several_labels_is_rejected(labels: dict[str, Any], count: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"with {count} labels; a reranker has exactly one"):
        RerankCheckpoint.load(folder(tmp_path, labelled(**labels)))


def test_num_labels_without_id2label_is_used(tmp_path: Path) -> None:
    assert RerankCheckpoint.load(folder(tmp_path, labelled(id2label=None, num_labels=1))).kind == "cross-encoder"


@pytest.mark.parametrize(
    ("config", "tokenizer", "limit"),
    [
        (labelled(), {"model_max_length": NO_LIMIT}, 512),
        (labelled(), {"model_max_length": 1e30}, 512),
        (labelled(), None, 512),
        (labelled(max_position_embeddings=8192), {"model_max_length": 1024}, 1024),
        (labelled("XLMRobertaForSequenceClassification", **ROBERTA), {"model_max_length": 514}, 512),
        ({**labelled(), **ROBERTA, "max_position_embeddings": 8194}, None, 8192),
        (labelled(max_position_embeddings=None), {"model_max_length": NO_LIMIT}, 512),
    ],
)
def test_length_limit_is_the_smallest_declared(
    config: dict[str, Any], tokenizer: dict[str, Any] | None, limit: int, tmp_path: Path
) -> None:
    assert RerankCheckpoint.load(folder(tmp_path, config, tokenizer_config=tokenizer)).max_length == limit


def test_bi_encoder_limit_is_bounded_by_its_positions(tmp_path: Path) -> None:
    path = bi_encoder(tmp_path, {**BERT, **ROBERTA}, sentence_bert_config={"max_seq_length": 514})
    assert RerankCheckpoint.load(path).max_length == 512


@pytest.mark.parametrize(("positions", "limit"), [(40960, 8192), (512, 512), (None, 8192)])
def test_causal_model_is_detected_with_its_limit(positions: int | None, limit: int, tmp_path: Path) -> None:
    config = {"architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": positions}
    found = RerankCheckpoint.load(folder(tmp_path, config, tokenizer_config={"model_max_length": 131072}))
    assert (found.kind, found.max_length) == ("causal", limit)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BERT, "holds BertModel, which cannot rerank"),
        ({"architectures": ["BertForMaskedLM"]}, "holds BertForMaskedLM, which cannot rerank"),
        ({}, "no named architecture"),
        (None, r"cannot read .*config\.json"),
    ],
)
def test_other_models_are_rejected(config: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        RerankCheckpoint.load(folder(tmp_path, config))


def test_unsupported_module_is_rejected(tmp_path: Path) -> None:
    path = bi_encoder(tmp_path, modules=modules("Transformer", "Pooling", "Dense"))
    with pytest.raises(CheckpointError, match="a module of type Dense; served: Transformer, Pooling, Normalize"):
        RerankCheckpoint.load(path)


@pytest.mark.parametrize("content", ["{", '{"a": 1}', "[1]", '[{"type": "x.Pooling"}]'])
def test_invalid_modules_file_is_rejected(content: str, tmp_path: Path) -> None:
    path = bi_encoder(tmp_path)
    (path / "modules.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match="not a list of sentence-transformers modules"):
        RerankCheckpoint.load(path)


def test_encoder_decoder_is_rejected(tmp_path: Path) -> None:
    path = bi_encoder(tmp_path, {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True})
    with pytest.raises(CheckpointError, match="encoder-decoder"):
        RerankCheckpoint.load(path)


def test_prompts_excluded_from_pooling_are_rejected(tmp_path: Path) -> None:
    path = bi_encoder(
        tmp_path,
        pooling={**MEAN, "include_prompt": False},
        config_sentence_transformers={"prompts": {"query": "Represent: "}},
    )
    with pytest.raises(CheckpointError, match="leaves its prompts out"):
        RerankCheckpoint.load(path)


def test_missing_folder_and_pickled_weights_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="set RERANK_MODEL_PATH"):
        RerankCheckpoint.load(tmp_path / "nothing")
    path = folder(tmp_path, labelled())
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no \.safetensors weights"):
        RerankCheckpoint.load(path)
