"""Files of a checkpoint: missing and damaged ones, by the files that the loaders of diffusers and transformers open."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from genserve.serve.weights import DamagedFile, Weights, exists, read_weights, require_file
from genserve_backend.checkpoints import CheckpointError, read_json, require_folder
from genserve_backend.errors import shorten
from genserve_backend.flux.checkpoint import WEIGHTS
from genserve_backend.rerank.sentence_transformers import Modules
from genserve_backend.settings import WeightsDType

FLUX_PARTS = ("scheduler", "tokenizer", "tokenizer_2", *WEIGHTS)
"""Parts of a FluxPipeline, each a folder."""
SLOW_TOKENIZERS = (("vocab.json", "merges.txt"), ("vocab.txt",))
"""Files that a fast tokenizer can be built from, in place of its tokenizer.json."""
SENTENCE_PIECES = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
"""The same, as a SentencePiece model. It needs the packages sentencepiece and protobuf."""
OPTIONAL_JSON = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files of a tokenizer that it may lack. If they are there, they are read."""


@dataclass
class Contents:
    """Contents of a checkpoint folder.

    Attributes:
        files: Number of files that were checked.
        weights: Weights by part: the folder's name, or "" for the checkpoint's own.
        problems: One line per missing or damaged file.
    """

    files: int = 0
    weights: dict[str, Weights] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> int:
        """Number of tensors."""
        return sum(len(weights.tensors) for weights in self.weights.values())

    def loaded_bytes(self, dtype: WeightsDType) -> int:
        """Return the bytes of all weights once they are loaded in `dtype`."""
        return sum(weights.loaded_bytes(dtype) for weights in self.weights.values())

    def add_weights(self, folder: Path, stem: str, *, index_first: bool, part: str = "") -> None:
        """Check the weights of one model."""
        weights = self.weights[part] = read_weights(folder, stem, index_first=index_first)
        self.files += weights.files
        self.problems += weights.problems

    def check(self, path: Path, read: Callable[[Path], object]) -> Any:
        """Return the file's content as `read` returns it; on a failure, note the problem and return None."""
        try:
            require_file(path)
            content = read(path)
        except (DamagedFile, CheckpointError) as error:
            self.problems.append(str(error))
            return None
        except OSError as error:
            self.problems.append(f"{path} cannot be read: {error.strerror}")
            return None
        self.files += 1
        return content


def check_flux(folder: Path) -> Contents:
    """Check a FLUX checkpoint in diffusers format.

    Raises:
        CheckpointError: There is no folder.
    """
    require_folder(folder, setting="FLUX_MODEL_PATH")
    contents = Contents()
    index = contents.check(folder / "model_index.json", read_json)
    if index is None:
        return contents
    if index.get("_class_name") != "FluxPipeline":
        contents.problems.append(f"{folder} holds a {shorten(index.get('_class_name'))}, not a FluxPipeline")
        return contents
    for part in FLUX_PARTS:
        entry = index.get(part)
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(name, str) for name in entry):
            contents.problems.append(f"{folder / 'model_index.json'} names no {part}")
        elif not exists(folder / part):
            contents.problems.append(f"{folder / part} is missing")
        elif part == "scheduler":
            contents.check(folder / part / "scheduler_config.json", read_json)
        elif part.startswith("tokenizer"):
            _check_tokenizer(folder / part, contents, needs_config=part == "tokenizer_2")
        else:
            contents.check(folder / part / "config.json", read_json)
            diffusers = entry[0] == "diffusers"
            stem = "diffusion_pytorch_model" if diffusers else "model"
            contents.add_weights(folder / part, stem, index_first=diffusers, part=part)
    return contents


def check_rerank(folder: Path) -> Contents:
    """Check a reranker in transformers or sentence-transformers format.

    Raises:
        CheckpointError: There is no folder.
    """
    require_folder(folder, setting="RERANK_MODEL_PATH")
    contents = Contents()
    modules = contents.check(folder / "modules.json", _modules) if exists(folder / "modules.json") else None
    model = folder
    if modules and modules.is_bi_encoder:
        model = modules.transformer
        contents.check(modules.folders["Pooling"] / "config.json", read_json)
    contents.check(model / "config.json", read_json)
    _check_optional(model, ("sentence_bert_config.json",), contents)
    _check_optional(folder, ("config_sentence_transformers.json",), contents)
    contents.add_weights(model, "model", index_first=False)
    _check_tokenizer(model, contents)
    return contents


def _modules(path: Path) -> Modules | None:
    return Modules.read(path.parent)


def _check_tokenizer(folder: Path, contents: Contents, *, needs_config: bool = False) -> None:
    _check_optional(folder, OPTIONAL_JSON, contents)
    if needs_config and not exists(folder / OPTIONAL_JSON[0]):
        contents.problems.append(f"{folder / OPTIONAL_JSON[0]} is missing")
    if exists(folder / "tokenizer.json"):
        contents.check(folder / "tokenizer.json", _tokenizer)
        return
    for names in SLOW_TOKENIZERS:
        if any(exists(folder / name) for name in names):
            for name in names:
                contents.check(folder / name, read_json if name.endswith(".json") else _lines)
            return
    for name in SENTENCE_PIECES:
        if exists(folder / name):
            contents.check(folder / name, _pieces)
            return
    contents.problems.append(f"{folder} has no tokenizer.json, and no other file that a tokenizer is built from")


def _check_optional(folder: Path, names: Sequence[str], contents: Contents) -> None:
    for name in names:
        if exists(folder / name):
            contents.check(folder / name, read_json)


def _tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except OSError:
        raise
    except Exception as error:  # tokenizers raises nothing more specific
        raise DamagedFile(f"{path} is no tokenizer: {shorten(str(error), 200)}") from None


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise DamagedFile(f"{path} is not UTF-8 text") from None
    if not lines:
        raise DamagedFile(f"{path} is empty")
    return lines


def _pieces(path: Path) -> int:
    """Parse a SentencePiece model as transformers does, and return the number of its pieces."""
    try:
        from google.protobuf.message import DecodeError

        messages: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except Exception as error:  # protobuf has an error of its own for versions that do not fit together
        raise DamagedFile(f"{path} needs sentencepiece and protobuf: {shorten(str(error), 200)}") from None
    model = messages.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise DamagedFile(f"{path} is no SentencePiece model") from None
    if not model.pieces:
        raise DamagedFile(f"{path} is a SentencePiece model without pieces")
    return len(model.pieces)
