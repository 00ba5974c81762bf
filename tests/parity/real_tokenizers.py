"""Tokenizers with real vocabularies, taken from Python packages that contain them.

Generated vocabularies lack other scripts and the thousands of merges through which the tokens of a text depend on the
text before it.
"""

from __future__ import annotations

import base64
import json
from functools import cache
from importlib.metadata import distribution
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

MINILM = Path(__file__).parents[2] / "demo" / "rerank"
"""all-MiniLM-L6-v2, with the word pieces of bert-base-uncased."""

QWEN_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
QWEN_ADDED = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)
"""Ordinary tokens whose ids follow those of the special tokens."""
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def word_pieces(*, max_length: int, segments: bool = True) -> Any:
    """Return the tokenizer of MiniLM.

    Args:
        max_length: The limit to declare in its files.
        segments: Whether it returns token_type_ids, for models with segments.
    """
    names = ["input_ids", "token_type_ids", "attention_mask"] if segments else ["input_ids", "attention_mask"]
    return AutoTokenizer.from_pretrained(MINILM, model_max_length=max_length, model_input_names=names)


def save_qwen3(folder: Path) -> None:
    """Write the files of Qwen3's tokenizer, with its published settings and vocabulary."""
    _qwen3().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 131_072,
        "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "unk_token": None,
        "bos_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@cache
def _qwen3() -> Tokenizer:
    lines = Path(str(distribution("dashscope").locate_file("dashscope/resources/qwen.tiktoken"))).read_bytes().split()
    ranks = {base64.b64decode(text): int(rank) for text, rank in zip(lines[::2], lines[1::2], strict=True)}
    letters = _letters()
    vocabulary = {_spelled(piece, letters): rank for piece, rank in ranks.items()}
    pairs = (_last_merge(piece, ranks) for piece in ranks if len(piece) > 1)
    merges = [(_spelled(left, letters), _spelled(right, letters)) for left, right in pairs]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in QWEN_ADDED])
    return tokenizer


def _last_merge(piece: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two tokens that merge into `piece`: those that all earlier merges leave."""
    parts = [piece[index : index + 1] for index in range(len(piece))]
    while len(parts) > 2:
        ages = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        at = ages.index(min(ages))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _spelled(piece: bytes, letters: dict[int, str]) -> str:
    return "".join(letters[byte] for byte in piece)


def _letters() -> dict[int, str]:
    """Return the printable letter for each byte in the files of byte-level tokenizers."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}
