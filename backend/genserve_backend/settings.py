"""Every setting of the models, parsed once into typed objects.

A value comes from the environment variable named at its field, else from ``parameters {}`` in the model's
``config.pbtxt`` (same name as the field), else from the default here. Nothing else reads either of the two.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

DType = Literal["auto", "float32", "bfloat16", "float16"]
RerankDType = Literal[DType, "int8"]


HANG_TIMEOUT_S = 300.0


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

    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads of one worker; 0 leaves the choice to torch."""
    start_timeout_s: float = Field(default=900.0, gt=0)
    """Seconds that a worker may take to load its model."""
    hang_timeout_s: Annotated[float, Env("HANG_TIMEOUT")] = Field(default=HANG_TIMEOUT_S, ge=2.0, le=86_400)
    """Seconds without a sign of life after which a worker, a stub or tritonserver is replaced; longer than the longest
    single step."""
    task_timeout_s: Annotated[float, Env("TASK_TIMEOUT")] = Field(default=240.0, gt=0, le=86_400)
    """Seconds that a request may wait in Triton's queue, and again that it may take from its arrival at an instance.

    Two limits of one length and not one deadline, because Triton does not tell a model how long a request has waited.
    A request's own timeout is applied in the same way; the client adds its deadline, which counts from the call.
    """

    @property
    def memory_share(self) -> float | None:
        """The part of a GPU's memory that torch may take, where it is limited."""
        return None

    def gpus(self, device: str) -> tuple[int, ...]:
        """The GPUs that a worker on `device` uses, by Triton's numbers; none on a CPU."""
        return (int(device.partition(":")[2] or 0),) if device.startswith("cuda") else ()


class FluxSettings(ModelSettings):
    """Settings of the `flux` model."""

    model_path: Annotated[Path, Env("FLUX_MODEL_PATH")]
    """A FLUX checkpoint folder in diffusers format."""
    dtype: Annotated[DType, Env("FLUX_DTYPE")] = "auto"
    """The arithmetic of the weights; auto is bfloat16 on a GPU and float32 on a CPU."""
    max_pixels: Annotated[int, Env("MAX_PIXELS")] = Field(default=2048 * 2048, ge=64 * 64, le=2**28)
    """The pixel budget: HEIGHT times WIDTH may not exceed it."""
    max_running: Annotated[int, Env("FLUX_MAX_RUNNING")] = Field(default=16, ge=1, le=1024)
    """Images that an instance denoises at a time."""
    max_batched_tokens: Annotated[int, Env("FLUX_MAX_BATCHED_TOKENS")] = Field(default=8192, ge=16)
    """Image tokens of all images that an instance denoises at a time, and so of a forward; a token is 16 x 16 pixels,
    and a true-CFG image counts twice. One image alone may exceed it."""
    max_gpu_queue_size: Annotated[int, Env("MAX_GPU_QUEUE_SIZE")] = Field(default=4, ge=0, le=1000)
    """Requests that an instance holds beyond those, so that an urgent one can take another one's place."""
    max_padding: float | None = Field(default=None, ge=0, le=10)
    """Padding tokens for one of an image's own, where sizes share a forward; 0 keeps sizes apart. The default is 0.25
    on a CPU, where it was measured, and 0 on a GPU, where it was not: there a mask rules out the fastest attention."""
    prompt_cache_bytes: int = Field(default=256 * 2**20, ge=0)
    """Device memory for the embeddings of the last prompts."""
    save_test_images: Annotated[Path | None, Env("SAVE_TEST_IMAGES")] = None
    """A folder that keeps a copy of every image, named by task id; `true` takes one in the temporary folder."""

    def padding_limit(self, device_type: str) -> float:
        """Padding tokens for one of an image's own, at most, on a device as torch names its type."""
        if self.max_padding is not None:
            return self.max_padding
        return 0.25 if device_type == "cpu" else 0.0

    @field_validator("save_test_images", mode="before")
    @classmethod
    def _folder(cls, value: object) -> object:
        if value is None or str(value).lower() in ("", "0", "false", "no", "off"):
            return None
        if isinstance(value, str) and value.lower() in ("1", "true", "yes", "on"):
            return Path(tempfile.gettempdir()) / "genserve-images"
        if not Path(str(value)).is_absolute():
            raise ValueError("give true, false or an absolute path")
        return value


@dataclass(frozen=True)
class SizeLimits:
    """What suits a model of a size."""

    max_num_seqs: int
    gpu_tokens: int
    """Tokens in one forward on a GPU: enough to be used well, and not so many that others wait."""
    cpu_tokens: int
    """The same on a CPU."""
    prefix_cache_bytes: int


SIZE_LIMITS = {
    "0.6B": SizeLimits(256, gpu_tokens=16_384, cpu_tokens=1_024, prefix_cache_bytes=256 * 2**20),
    "4B": SizeLimits(128, gpu_tokens=8_192, cpu_tokens=256, prefix_cache_bytes=512 * 2**20),
    "8B": SizeLimits(64, gpu_tokens=4_096, cpu_tokens=128, prefix_cache_bytes=512 * 2**20),
}
"""The defaults of each size that Qwen3-Reranker comes in: docs/operating.md has the reasons."""
DEFAULT_LIMITS = SIZE_LIMITS["0.6B"]


class RerankSettings(ModelSettings):
    """Settings of the `rerank` model."""

    model_path: Annotated[Path, Env("RERANK_MODEL_PATH")]
    """A reranker's folder in transformers or sentence-transformers format; or, with `model_size`, one that has those of
    Qwen3-Reranker in it."""
    dtype: Annotated[RerankDType, Env("RERANK_DTYPE")] = "auto"
    """The arithmetic of the weights; auto is bfloat16 on a GPU and float32 on a CPU. int8 is for CPUs: the products of
    matrices are then in int8, the rest in float32."""
    compiled: Annotated[bool, Env("RERANK_COMPILE")] = False
    """Whether torch.compile fuses what lies between the products of matrices; the start then takes longer."""
    model_size: Annotated[Literal["0.6B", "4B", "8B"] | None, Env("MODEL_SIZE")] = None
    """Picks the folder among several, and the defaults of the limits below."""
    engine: Annotated[Literal["torch", "vllm"], Env("ENGINE")] = "torch"
    """What runs the model; vllm serves causal rerankers, where the package vllm is installed."""
    max_num_seqs: Annotated[int, Env("MAX_NUM_SEQS")] = Field(default=DEFAULT_LIMITS.max_num_seqs, ge=1, le=65_536)
    """Pairs of query and document in one forward, at most; the default is less for larger models."""
    max_num_batched_tokens: Annotated[int, Env("MAX_NUM_BATCHED_TOKENS")] = Field(default=0, ge=0)
    """Tokens in one forward, padding included, at most (one pair alone may exceed it); 0 is 16,384 on a GPU and 1,024
    on a CPU, which is busy with that many for long enough to be used well, and not so long that others wait; less for
    larger models."""
    gpu_memory_utilization: Annotated[float, Env("GPU_MEMORY_UTILIZATION")] = Field(default=0.9, gt=0, le=1)
    """The part of a GPU's memory that an instance may take: vLLM does take it, torch is limited to it if it is set."""
    tensor_parallel_size: Annotated[int, Env("TENSOR_PARALLEL_SIZE")] = Field(default=1, ge=1, le=64)
    """GPUs that share one instance's model, with vLLM."""
    gpu_groups: tuple[tuple[int, ...], ...] = ()
    """Which GPUs those are, as in ``0,1;2,3``: `genserve serve` writes it. A group goes by its first; without groups,
    it is the GPUs that follow the instance's own."""
    max_length: int = Field(default=0, ge=0)
    """Tokens of one pair, at most; 0 takes the checkpoint's own limit."""
    max_waiting_requests: int = Field(default=64, ge=1, le=10_000)
    """Requests that an instance holds before it leaves the others in Triton's queue."""
    max_held_batches: int = Field(default=8, ge=1, le=10_000)
    """Forwards' worth of tokens that an instance holds before it leaves the others in Triton's queue."""

    prefix_cache_bytes: int = Field(default=DEFAULT_LIMITS.prefix_cache_bytes, ge=0)
    """Device memory for the keys and values of what prompts of a causal reranker have in common; 0 turns that off. The
    default is more for larger models; vLLM on a GPU takes what `gpu_memory_utilization` leaves it."""

    score_cache_bytes: Annotated[int, Env("SCORE_CACHE_BYTES")] = Field(default=64 * 2**20, ge=0)
    """Memory for the scores of the last pairs of query and document; 0 turns that off."""

    @model_validator(mode="before")
    @classmethod
    def _sized(cls, values: Any) -> Any:
        """Do what `model_size` stands for, where nothing else has been said."""
        limits = SIZE_LIMITS.get(str(values.get("model_size")))
        if not limits:
            return values
        path = Path(str(values.get("model_path", "")))
        if "model_path" in values and not any((path / name).is_file() for name in _CHECKPOINT_FILES):
            values = {**values, "model_path": path / f"Qwen3-Reranker-{values['model_size']}"}
        return {"max_num_seqs": limits.max_num_seqs, "prefix_cache_bytes": limits.prefix_cache_bytes, **values}

    @field_validator("engine")
    @classmethod
    def _torch_alone(cls, value: str, info: ValidationInfo) -> str:
        if value == "vllm" and info.data.get("dtype") == "int8":
            raise ValueError("int8 is for torch alone; choose another RERANK_DTYPE")
        if value == "vllm" and info.data.get("compiled"):
            raise ValueError("RERANK_COMPILE is for torch alone; vLLM compiles as it sees fit")
        return value

    @field_validator("compiled")
    @classmethod
    def _not_int8(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("dtype") == "int8":
            raise ValueError("int8 cannot be compiled; choose another RERANK_DTYPE")
        return value

    @field_validator("gpu_groups", mode="before")
    @classmethod
    def _groups(cls, value: object) -> object:
        return [group.split(",") for group in value.split(";")] if isinstance(value, str) else value

    @field_validator("tensor_parallel_size")
    @classmethod
    def _vllm_alone(cls, value: int, info: ValidationInfo) -> int:
        if value > 1 and info.data.get("engine") == "torch":
            raise ValueError("one instance uses several GPUs with ENGINE=vllm alone")
        return value

    def token_budget(self, device: str) -> int:
        """Tokens in one forward, at most, on a device as torch names it."""
        limits = SIZE_LIMITS[self.model_size] if self.model_size else DEFAULT_LIMITS
        return self.max_num_batched_tokens or (limits.gpu_tokens if device.startswith("cuda") else limits.cpu_tokens)

    @property
    def memory_share(self) -> float | None:
        """The part of a GPU's memory that torch may take, where it is limited."""
        is_set = self.engine == "torch" and "gpu_memory_utilization" in self.model_fields_set
        return self.gpu_memory_utilization if is_set else None

    def gpus(self, device: str) -> tuple[int, ...]:
        """The GPUs that a worker on `device` uses: with vLLM those of its group."""
        alone = super().gpus(device)
        if self.engine == "torch" or not alone:
            return alone
        first = alone[0]
        following = tuple(range(first, first + self.tensor_parallel_size))
        return next((group for group in self.gpu_groups if group[0] == first), following)


_CHECKPOINT_FILES = ("config.json", "modules.json")
"""What a checkpoint's own folder has one of."""


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
