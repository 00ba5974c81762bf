"""The configuration of a sentence-transformers folder: modules, pooling and prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from genserve_backend.checkpoints import CheckpointError, read_json

Pooling = Literal["cls", "mean", "max", "lasttoken"]

_POOLINGS: tuple[Pooling, ...] = ("cls", "mean", "max", "lasttoken")
# Folders older than the key "pooling_mode" have one boolean per mode.
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Normalize may be skipped: it changes only the length of an embedding, which the cosine ignores.
_SERVED_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class EmbeddingOptions:
    """The steps of a bi-encoder around its model."""

    pooling: Pooling
    """The way that token embeddings become the embedding of the text."""
    query_prompt: str = ""
    """Put in front of every query."""
    document_prompt: str = ""
    """Put in front of every document."""
    lowercase: bool = False
    """True if texts are lowercased before tokenization."""
    max_length: int | None = None
    """The folder's limit in tokens, including special tokens; None if it has none."""


@dataclass(frozen=True)
class Modules:
    """The modules.json of a folder."""

    folders: dict[str, Path]
    """The folder of each module, by the last part of its type."""

    @classmethod
    def read(cls, folder: Path) -> Modules | None:
        """Load the modules.json of `folder`; return None if it has none.

        Raises:
            CheckpointError: The file is not a list of modules.
        """
        path = folder / "modules.json"
        if not path.is_file():
            return None
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            return cls({str(entry["type"]).rpartition(".")[2]: folder / str(entry["path"]) for entry in entries})
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            raise CheckpointError(f"{path} is not a list of sentence-transformers modules") from None

    @property
    def is_bi_encoder(self) -> bool:
        """True if the modules embed a text; a CrossEncoder's folder has no pooling."""
        return "Transformer" in self.folders and "Pooling" in self.folders

    @property
    def transformer(self) -> Path:
        """The folder of the model and its tokenizer."""
        return self.folders["Transformer"]

    def options(self, folder: Path) -> EmbeddingOptions:
        """Return the options of the bi-encoder in `folder`.

        Raises:
            CheckpointError: A module, the pooling or the prompts are not supported.
        """
        if others := [name for name in self.folders if name not in _SERVED_MODULES]:
            raise CheckpointError(f"{folder} has a module of type {others[0]}; served: {', '.join(_SERVED_MODULES)}")
        pooling = read_json(self.folders["Pooling"] / "config.json")
        transformer = _optional_json(self.transformer / "sentence_bert_config.json")
        prompts = _optional_json(folder / "config_sentence_transformers.json").get("prompts") or {}
        if not isinstance(prompts, dict):
            raise CheckpointError(f"the prompts in {folder}/config_sentence_transformers.json are not a JSON object")
        query = str(prompts.get("query") or "")
        document = str(prompts.get("document") or prompts.get("passage") or prompts.get("corpus") or "")
        if (query or document) and not pooling.get("include_prompt", True):
            raise CheckpointError(f"{folder} leaves its prompts out of the pooling, which is not served")
        limit = transformer.get("max_seq_length")
        return EmbeddingOptions(
            pooling=_pooling(pooling, self.folders["Pooling"]),
            query_prompt=query,
            document_prompt=document,
            lowercase=bool(transformer.get("do_lower_case")),
            max_length=limit if isinstance(limit, int) and limit > 0 else None,
        )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _pooling(config: dict[str, Any], folder: Path) -> Pooling:
    declared = config.get("pooling_mode")
    if declared is None:
        declared = [mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag)] or ["mean"]
    modes = [declared] if isinstance(declared, str) else declared
    for served in _POOLINGS:
        if modes == [served]:
            return served
    raise CheckpointError(f"the pooling in {folder} is {declared}; served is one of {', '.join(_POOLINGS)}")
