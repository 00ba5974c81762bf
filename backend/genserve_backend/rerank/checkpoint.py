"""What kind of reranker a checkpoint folder holds and how long a text it can read, decided from its own files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from genserve_backend.checkpoints import CheckpointError, read_json, require_folder, require_safetensors
from genserve_backend.rerank.sentence import Modules, SentenceOptions

Kind = Literal["bi-encoder", "cross-encoder", "causal"]

CAUSAL_MAX_LENGTH = 8192
"""The published limit of yes/no rerankers, in tokens; their position tables reach further than their training did."""

# Models whose first position is pad_token_id + 1, so that the table's first rows never belong to a token.
_OFFSET_POSITIONS = frozenset(
    {
        "camembert",
        "data2vec-text",
        "longformer",
        "luke",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
# transformers writes int(1e30) where a tokenizer has no limit.
_NO_LIMIT = 10**9
# For the rare checkpoint that names no limit anywhere.
_FALLBACK_MAX_LENGTH = 512


@dataclass(frozen=True)
class RerankCheckpoint:
    """A folder that can be served."""

    path: Path
    """Where the weights and the tokenizer are."""
    kind: Kind
    name: str
    """The folder's name, for people."""
    max_length: int
    """Tokens of one sequence, at most, special tokens and (for causal) the template included."""
    sentence: SentenceOptions | None = None
    """Set for a bi-encoder, and only there."""

    @classmethod
    def read(cls, path: Path) -> RerankCheckpoint:
        """Look at the folder `path` without loading a weight.

        Raises:
            CheckpointError: It is missing, incomplete, or holds nothing that can rerank; one line says which.
        """
        require_folder(path, setting="RERANK_MODEL_PATH")
        name = path.resolve().name
        modules = Modules.read(path)
        weights = modules.transformer if modules and modules.is_bi_encoder else path
        config = read_json(weights / "config.json")
        require_safetensors(weights)
        architecture = _architecture(config)
        # In this order: a CrossEncoder's folder may have a modules.json too, and an embedding model's base may be a
        # ForCausalLM whose yes and no mean nothing.
        if architecture.endswith("ForSequenceClassification"):
            _require_one_label(config, path)
            return cls(weights, "cross-encoder", name, _encoder_limit(config, weights))
        if modules and modules.is_bi_encoder:
            if config.get("is_encoder_decoder"):
                raise CheckpointError(f"{path} is an encoder-decoder ({architecture}), which is not served")
            sentence = modules.options(path)
            limit = _encoder_limit(config, weights, declared=sentence.max_length)
            return cls(weights, "bi-encoder", name, limit, sentence)
        if architecture.endswith("ForCausalLM"):
            limit = min(CAUSAL_MAX_LENGTH, _positions(config) or CAUSAL_MAX_LENGTH)
            return cls(weights, "causal", name, limit)
        raise CheckpointError(
            f"{path} holds {architecture or 'no named architecture'}, which cannot rerank; served are sentence-"
            "transformers folders with pooling, ForSequenceClassification with one label, and ForCausalLM"
        )


def _architecture(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _require_one_label(config: dict[str, Any], path: Path) -> None:
    names, count = config.get("id2label"), config.get("num_labels")
    # Neither key means two labels: that is the default of transformers.
    labels = len(names) if isinstance(names, dict) else count if isinstance(count, int) else 2
    if labels != 1:
        raise CheckpointError(f"{path} is a classifier with {labels} labels; a reranker has exactly one")


def _encoder_limit(config: dict[str, Any], folder: Path, *, declared: int | None = None) -> int:
    limit = declared or _tokenizer_limit(folder)
    known = [number for number in (limit, _positions(config)) if number is not None]
    return min(known, default=_FALLBACK_MAX_LENGTH)


def _tokenizer_limit(folder: Path) -> int | None:
    path = folder / "tokenizer_config.json"
    limit = read_json(path).get("model_max_length") if path.is_file() else None
    return int(limit) if isinstance(limit, (int, float)) and 0 < limit < _NO_LIMIT else None


def _positions(config: dict[str, Any]) -> int | None:
    table = config.get("max_position_embeddings", config.get("n_positions"))
    if not isinstance(table, int) or table <= 0:
        return None
    if config.get("model_type") not in _OFFSET_POSITIONS:
        return table
    pad = config.get("pad_token_id")
    return table - (pad if isinstance(pad, int) else 1) - 1


def first_position(config: Any) -> int:
    """The position of a sequence's first token in the position table of a model with this transformers `config`."""
    if config.model_type not in _OFFSET_POSITIONS:
        return 0
    return int(config.pad_token_id) + 1
