"""The kind and length limit of a reranker checkpoint, determined from its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from genserve_backend.checkpoints import CheckpointError, read_json, require_folder, require_safetensors
from genserve_backend.rerank.sentence_transformers import EmbeddingOptions, Modules

Kind = Literal["bi-encoder", "cross-encoder", "causal"]

CAUSAL_MAX_LENGTH = 8192
"""The published limit of yes/no rerankers, in tokens; their position tables are longer than their training texts."""

# Models whose first position is pad_token_id + 1: no token uses the positions before it.
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
# transformers writes int(1e30) for a tokenizer without a limit.
_NO_LIMIT = 10**9
# For the rare checkpoint without any limit in its files.
_FALLBACK_MAX_LENGTH = 512


@dataclass(frozen=True)
class RerankCheckpoint:
    """A folder that can be served."""

    path: Path
    """The folder of the weights and the tokenizer."""
    kind: Kind
    name: str
    """The checkpoint folder's name, for display."""
    max_length: int
    """Most tokens of a sequence, including special tokens and the template of a causal model."""
    embedding: EmbeddingOptions | None = None
    """Set for bi-encoders only."""

    @classmethod
    def load(cls, path: Path) -> RerankCheckpoint:
        """Inspect the folder `path` without loading its weights.

        Raises:
            CheckpointError: It is missing, incomplete, or no reranker. The message is one line.
        """
        require_folder(path, setting="RERANK_MODEL_PATH")
        name = path.resolve().name
        modules = Modules.read(path)
        weights = modules.transformer if modules and modules.is_bi_encoder else path
        config = read_json(weights / "config.json")
        require_safetensors(weights)
        architecture = _architecture(config)
        # The order matters: a CrossEncoder's folder may have a modules.json too, and the base of an embedding model may
        # be a ForCausalLM, whose yes and no mean nothing.
        if architecture.endswith("ForSequenceClassification"):
            _require_one_label(config, path)
            return cls(weights, "cross-encoder", name, _encoder_limit(config, weights))
        if modules and modules.is_bi_encoder:
            if config.get("is_encoder_decoder"):
                raise CheckpointError(f"{path} is an encoder-decoder ({architecture}), which is not served")
            embedding = modules.options(path)
            limit = _encoder_limit(config, weights, declared=embedding.max_length)
            return cls(weights, "bi-encoder", name, limit, embedding)
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
    # Without either key transformers assumes two labels.
    labels = len(names) if isinstance(names, dict) else count if isinstance(count, int) else 2
    if labels != 1:
        raise CheckpointError(f"{path} is a classifier with {labels} labels; a reranker has exactly one")


def _encoder_limit(config: dict[str, Any], folder: Path, *, declared: int | None = None) -> int:
    limits = (declared or _tokenizer_limit(folder), _positions(config))
    return min((limit for limit in limits if limit is not None), default=_FALLBACK_MAX_LENGTH)


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
    """Return the position of a sequence's first token in a model with this transformers `config`."""
    if config.model_type not in _OFFSET_POSITIONS:
        return 0
    return int(config.pad_token_id) + 1
