"""What a sentence-transformers folder says about itself: its modules, its pooling, its prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from genserve_backend.checkpoints import CheckpointError, read_json

Pooling = Literal["cls", "mean", "max", "lasttoken"]

_POOLINGS: tuple[Pooling, ...] = ("cls", "mean", "max", "lasttoken")
# Folders from before the single key "pooling_mode" have one boolean for each mode.
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Normalize changes an embedding's length and not its direction, and the cosine reads the direction alone.
_SERVED_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class SentenceOptions:
    """How a bi-encoder turns a text into one embedding."""

    pooling: Pooling
    """Which of the token embeddings make up the text's."""
    query_prompt: str = ""
    """Stands in front of every query."""
    document_prompt: str = ""
    """Stands in front of every document."""
    lowercase: bool = False
    """The text is lowercased before it is tokenised."""
    max_length: int | None = None
    """The folder's own limit in tokens, special tokens included; None where it names none."""


@dataclass(frozen=True)
class Modules:
    """The modules.json of a folder: the last part of each module's type, and its subfolder."""

    folders: dict[str, Path]

    @classmethod
    def read(cls, folder: Path) -> Modules | None:
        """The modules of `folder`, or None where it has no modules.json.

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
        """Whether the modules make one embedding of one text; a CrossEncoder's folder has no pooling."""
        return "Transformer" in self.folders and "Pooling" in self.folders

    @property
    def transformer(self) -> Path:
        """The folder of the model and its tokenizer."""
        return self.folders["Transformer"]

    def options(self, folder: Path) -> SentenceOptions:
        """Read everything about the bi-encoder in `folder` that is not in the model itself.

        Raises:
            CheckpointError: It has a module or a pooling that is not served.
        """
        if unknown := [name for name in self.folders if name not in _SERVED_MODULES]:
            raise CheckpointError(f"{folder} has a module of type {unknown[0]}; served: {', '.join(_SERVED_MODULES)}")
        pooling = _read_if_there(self.folders["Pooling"] / "config.json", required=True)
        transformer = _read_if_there(self.transformer / "sentence_bert_config.json")
        prompts = _read_if_there(folder / "config_sentence_transformers.json").get("prompts") or {}
        if not isinstance(prompts, dict):
            raise CheckpointError(f"the prompts in {folder}/config_sentence_transformers.json are not a JSON object")
        query = str(prompts.get("query") or "")
        document = str(prompts.get("document") or prompts.get("passage") or prompts.get("corpus") or "")
        if (query or document) and not pooling.get("include_prompt", True):
            raise CheckpointError(f"{folder} leaves its prompts out of the pooling, which is not served")
        limit = transformer.get("max_seq_length")
        return SentenceOptions(
            pooling=_pooling(pooling, self.folders["Pooling"]),
            query_prompt=query,
            document_prompt=document,
            lowercase=bool(transformer.get("do_lower_case")),
            max_length=limit if isinstance(limit, int) and limit > 0 else None,
        )


def _read_if_there(path: Path, *, required: bool = False) -> dict[str, Any]:
    return read_json(path) if required or path.is_file() else {}


def _pooling(config: dict[str, Any], folder: Path) -> Pooling:
    declared = config.get("pooling_mode")
    if declared is None:
        declared = [mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag)] or ["mean"]
    modes = [declared] if isinstance(declared, str) else declared
    for served in _POOLINGS:
        if modes == [served]:
            return served
    raise CheckpointError(f"the pooling in {folder} is {declared}; served is one of {', '.join(_POOLINGS)}")
