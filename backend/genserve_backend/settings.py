"""Every setting of the models, parsed once into typed objects.

A value comes from the environment variable named at its field, else from ``parameters {}`` in the model's
``config.pbtxt`` (same name as the field), else from the default here. Nothing else reads either of the two.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

DType = Literal["auto", "float32", "bfloat16", "float16"]


class Env(str):
    """Marks a field with the environment variable that overrides it."""

    __slots__ = ()


class SettingsError(Exception):
    """A setting has a value that cannot be used; the message names it and where it came from."""


class ModelSettings(BaseModel):
    """What every model has."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_path: Path
    """The checkpoint folder; each model names the environment variable that overrides it."""

    dtype: DType = "auto"
    """The arithmetic of the weights; auto is bfloat16 on a GPU and float32 on a CPU."""
    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads of one worker; 0 leaves the choice to torch."""
    start_timeout_s: float = Field(default=900.0, gt=0)
    """Seconds that a worker may take to load its model."""
    task_timeout_s: Annotated[float, Env("TASK_TIMEOUT")] = Field(default=240.0, gt=0, le=86_400)
    """Seconds after which a request that runs is given up."""


class FluxSettings(ModelSettings):
    """Settings of the `flux` model."""

    model_path: Annotated[Path, Env("FLUX_MODEL_PATH")]
    """A FLUX checkpoint folder in diffusers format."""
    max_pixels: Annotated[int, Env("MAX_PIXELS")] = Field(default=2048 * 2048, ge=64 * 64, le=2**28)
    """The pixel budget: HEIGHT times WIDTH may not exceed it."""
    max_gpu_queue_size: Annotated[int, Env("MAX_GPU_QUEUE_SIZE")] = Field(default=0, ge=0, le=1000)
    """Images that an instance holds ready beyond the one that runs. What it holds no longer waits by priority."""


class RerankSettings(ModelSettings):
    """Settings of the `rerank` model."""

    model_path: Annotated[Path, Env("RERANK_MODEL_PATH")]
    """A reranker's folder in transformers or sentence-transformers format."""
    max_num_seqs: Annotated[int, Env("MAX_NUM_SEQS")] = Field(default=256, ge=1, le=65_536)
    """Pairs of query and document in one forward, at most."""
    max_num_batched_tokens: Annotated[int, Env("MAX_NUM_BATCHED_TOKENS")] = Field(default=16_384, ge=1)
    """Tokens in one forward, padding included, at most (one pair alone may exceed it)."""
    max_length: int = Field(default=0, ge=0)
    """Tokens of one pair, at most; 0 takes the checkpoint's own limit."""
    max_waiting_requests: int = Field(default=16, ge=1, le=10_000)
    """Requests that an instance holds before it leaves the others in Triton's queue."""


SettingsT = TypeVar("SettingsT", bound=ModelSettings)


def load(
    kind: type[SettingsT],
    parameters: Mapping[str, str],
    *,
    repository: Path,
    environ: Mapping[str, str] = os.environ,
) -> SettingsT:
    """Parse the settings of one model.

    Args:
        kind: The settings class of the model.
        parameters: The ``parameters {}`` of its config.pbtxt.
        repository: The model repository; a relative ``model_path`` starts there.
        environ: Where the overrides come from.

    Raises:
        SettingsError: A value is missing, unknown or out of range.
    """
    values: dict[str, str] = dict(parameters)
    origin = dict.fromkeys(values, "config.pbtxt")
    for name, field in kind.model_fields.items():
        for env in (mark for mark in field.metadata if isinstance(mark, Env)):
            if environ.get(env, "") != "":
                values[name], origin[name] = environ[env], str(env)
    try:
        if "model_path" in values and origin["model_path"] == "config.pbtxt":
            values["model_path"] = str((repository / values["model_path"]).resolve())
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "?"
        where = origin.get(name, "config.pbtxt")
        label = where if where != "config.pbtxt" else f"parameter {name} in config.pbtxt"
        raise SettingsError(f"{label}: {first['msg']} (value: {values.get(name)!r})") from None
