"""Tiny generated checkpoints with random weights, one per kind of reranker.

The weights have a much larger variance than freshly initialized ones, so that different texts get clearly different
scores.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
CORPUS = (
    "Paris is the capital of France and Berlin is the capital of Germany.",
    "The giant panda is a bear that eats bamboo, and yes, it lives in China.",
    "no yes no yes no yes What is the capital of the country? A query, a document, an answer.",
    "巴黎是法国的首都。大熊猫吃竹子。",
)


def bert_bi_encoder(folder: Path, *, pooling: str = "mean", max_seq_length: int = 48) -> Path:
    """Write a sentence-transformers folder: a BertModel, pooling and a Normalize module."""
    tokenizer = _word_pieces()
    _seed()
    _save(folder, BertModel(_bert_config(tokenizer)), tokenizer)
    modules = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    entries = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(modules)
    ]
    write_json(folder / "modules.json", entries)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": False})
    names = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens", "lasttoken": "lasttoken"}
    flags = {f"pooling_mode_{name}": mode == pooling for mode, name in names.items()}
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **flags})
    return folder


def bert_cross_encoder(folder: Path, *, num_labels: int = 1) -> Path:
    """Write a BertForSequenceClassification with segments and a limit of 64 tokens."""
    tokenizer = _word_pieces()
    _seed()
    return _save(folder, BertForSequenceClassification(_bert_config(tokenizer, num_labels=num_labels)), tokenizer)


def roberta_cross_encoder(folder: Path) -> Path:
    """Write a RobertaForSequenceClassification without segments; 64 of its 66 positions are usable."""
    tokenizer = _byte_pairs(("<s>", "<pad>", "</s>", "<unk>"), model_max_length=int(1e30))
    tokenizer.backend_tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.add_special_tokens({"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"})
    _seed()
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=66,
        type_vocab_size=1,
        pad_token_id=1,
        num_labels=1,
        **_SIZES,
    )
    return _save(folder, RobertaForSequenceClassification(config), tokenizer)


def modern_bert_cross_encoder(folder: Path) -> Path:
    """Write a ModernBertForSequenceClassification with rotary positions and a layer that sees 8 tokens to each side."""
    tokenizer = _word_pieces()
    _seed()
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        local_attention=16,
        global_attn_every_n_layers=2,
        pad_token_id=0,
        cls_token_id=2,
        sep_token_id=3,
        num_labels=1,
        **_SIZES,
    )
    return _save(folder, ModernBertForSequenceClassification(config), tokenizer)


def qwen3_causal(folder: Path, *, answers: bool = True, layers: int = 2) -> Path:
    """Write a Qwen3ForCausalLM with 512 positions; without `answers` its tokenizer has no token for yes."""
    tokenizer = _byte_pairs(CHAT_TOKENS, corpus=CORPUS if answers else ("abc abc",))
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"})
    _seed()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        pad_token_id=0,
        **{**_SIZES, "initializer_range": 0.15, "num_hidden_layers": layers},
    )
    return _save(folder, Qwen3ForCausalLM(config), tokenizer)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON and create missing parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}


def _seed() -> None:
    torch.manual_seed(7)


def _save(folder: Path, model: Any, tokenizer: PreTrainedTokenizerFast) -> Path:
    model.eval().save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder


def _bert_config(tokenizer: PreTrainedTokenizerFast, *, num_labels: int = 1) -> BertConfig:
    return BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=0, num_labels=num_labels, **_SIZES
    )


def _word_pieces() -> PreTrainedTokenizerFast:
    words = sorted({word for text in CORPUS[:3] for word in text.lower().replace(",", "").replace(".", "").split()})
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    characters = sorted(set(CORPUS[3]))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = list(dict.fromkeys([*special, *words, *letters, *characters, *(f"##{letter}" for letter in letters)]))
    tokenizer = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _byte_pairs(
    special: tuple[str, ...], *, corpus: tuple[str, ...] = CORPUS, model_max_length: int = 131_072
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    # Each word also without a leading space, as at the start of a text.
    tokenizer.train_from_iterator([*corpus, *(word for text in corpus for word in text.split())], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
    )
