"""Settings of the models, parsed once into typed objects.

A value comes from the environment variable that its field names, else from ``parameters {}`` in the model's
``config.pbtxt`` (under the field's name), else from the default here. No other code reads either of the two.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

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
FluxDType = Literal[DType, "fp8", "int8", "int8wo"]
RerankDType = Literal[DType, "int8"]
CacheMethod = Literal["magcache", "first-block"]
PolicyName = Literal["urgency", "slack", "fifo", "shortest"]
WeightsDType = Literal["float32", "bfloat16", "float16"]

CONFIG_FILE = "config.pbtxt"
RELATIVE_PATHS = ("model_path", "lora_path")
"""Settings that may be relative to the model repository in config.pbtxt."""
HANG_TIMEOUT_S = 300.0


class Env(str):
    """Environment variable that overrides a field."""

    __slots__ = ()


class SettingInForce(NamedTuple):
    """A setting of a running model."""

    name: str
    value: Any
    """The value, as JSON can hold it."""
    source: str
    """``environment VARIABLE``, ``config.pbtxt``, ``MODEL_SIZE`` or ``default``."""


class SettingsError(Exception):
    """A setting has an invalid value; the message names the setting, the value and its origin."""


class ModelSettings(BaseModel):
    """Settings of every model."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_path: Path
    """The checkpoint folder; each model has its own environment variable for it."""

    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads per worker; each model has its own environment variable for them."""
    start_timeout_s: float = Field(default=900.0, gt=0)
    """Time limit for loading the model, in seconds."""
    hang_timeout_s: Annotated[float, Env("HANG_TIMEOUT")] = Field(default=HANG_TIMEOUT_S, ge=2.0, le=86_400)
    """Seconds without a sign of life after which a worker, a stub or tritonserver is replaced. It has to be longer than
    the longest step."""
    task_timeout_s: Annotated[float, Env("TASK_TIMEOUT")] = Field(default=240.0, gt=0, le=86_400)
    """Time limit of a request in Triton's queue, and again from its arrival at an instance to its answer, in seconds.

    These are two limits instead of one deadline, because Triton does not tell a model how long a request has waited. A
    request's own timeout applies in the same way. The client's deadline counts from the call.
    """
    compile_cache: Annotated[Path | None, Env("COMPILE_CACHE")] = None
    """Absolute path of the folder for compiled code, which makes later starts faster; by default `compiled` in
    GENSERVE_CACHE_DIR. It has to belong to the server's user."""

    @field_validator("compile_cache")
    @classmethod
    def _check_absolute(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_absolute():
            raise ValueError("give an absolute path")
        return value

    @property
    def memory_share(self) -> float | None:
        """Limit on torch's share of a GPU's memory, or None."""
        return None

    def gpus(self, device: str) -> tuple[int, ...]:
        """Return the GPUs of a worker on `device`, in Triton's numbering; none on a CPU."""
        return (int(device.partition(":")[2] or 0),) if device.startswith("cuda") else ()

    def sized(self, device: str) -> Mapping[str, Any]:
        """Return the limits that follow from the model's size unless they are set, for a device in torch's notation."""
        return {}


class FluxSettings(ModelSettings):
    """Settings of the `flux` model."""

    model_path: Annotated[Path, Env("FLUX_MODEL_PATH")]
    """A FLUX checkpoint folder in diffusers format."""
    threads: Annotated[int, Env("FLUX_THREADS")] = Field(default=0, ge=0, le=1024)
    """CPU threads per worker; 0 selects torch's default, which OMP_NUM_THREADS sets."""
    lora_path: Annotated[Path | None, Env("LORA_PATH")] = None
    """The folder of LoRA adapters that requests can name: NAME.safetensors or NAME/pytorch_lora_weights.safetensors."""
    dtype: Annotated[FluxDType, Env("FLUX_DTYPE")] = "auto"
    """dtype of the weights; auto is bfloat16 on a GPU and float32 on a CPU. The last three are the transformer's only:
    fp8 for GPUs of capability 8.9, int8 for CPUs with VNNI, and int8wo, int8 weights that are multiplied in auto's
    dtype."""
    t5_dtype: Annotated[Literal["auto", "int8wo"], Env("FLUX_T5_DTYPE")] = "auto"
    """dtype of T5's weights; auto is that of the other weights, int8wo takes half of bfloat16's memory."""
    offload: Annotated[Literal["none", "idle", "blocks"], Env("FLUX_OFFLOAD")] = "none"
    """Weights in host memory that are copied to the GPU for each use: idle is the text encoders and the VAE, blocks
    also the transformer's blocks. Without effect on a CPU."""
    vae_tiling: Annotated[bool, Env("FLUX_VAE_TILING")] = False
    """Decode large images in overlapping tiles of half the native size: less memory, slightly different images."""
    cache_method: Annotated[CacheMethod, Env("FLUX_CACHE")] = "magcache"
    """Method of skipping steps for requests with CACHE: magcache decides by the checkpoint's ratios, first-block by the
    change of the first block's output."""
    compiled: Annotated[bool, Env("FLUX_COMPILE")] = False
    """Use torch.compile to fuse the operators of the transformer's blocks; the start takes longer."""
    deterministic: Annotated[bool, Env("FLUX_DETERMINISTIC")] = False
    """Make the same bytes of an image whatever runs beside it: every forward, encoding and decoding has one image.
    Images then take turns, and share nothing."""
    max_pixels: Annotated[int, Env("MAX_PIXELS")] = Field(default=2048 * 2048, ge=64 * 64, le=2**28)
    """Limit on HEIGHT times WIDTH, in pixels."""
    max_running: Annotated[int, Env("FLUX_MAX_RUNNING")] = Field(default=16, ge=1, le=1024)
    """Slots: images that an instance denoises at a time."""
    max_batched_tokens: Annotated[int, Env("FLUX_MAX_BATCHED_TOKENS")] = Field(default=8192, ge=16)
    """Limit on the image tokens of all slots, and therefore of a forward. A token is 16 x 16 pixels; an image with true
    classifier-free guidance counts twice. A single image may exceed the limit."""
    max_gpu_queue_size: Annotated[int, Env("MAX_GPU_QUEUE_SIZE")] = Field(default=4, ge=0, le=1000)
    """Requests that an instance holds in addition, so that an urgent one can preempt another one."""
    max_padding: Annotated[float | None, Env("FLUX_MAX_PADDING")] = Field(default=None, ge=0, le=10)
    """Largest ratio of padding to an image's own tokens if sizes share a forward; 0 keeps sizes apart. The default is
    0.25 on a CPU, and 0 on a GPU and for int8: there, images differ more from those made alone if they are padded."""
    policy: Annotated[PolicyName, Env("FLUX_POLICY")] = "urgency"
    """Order of the images: urgency is by priority level, then the oldest first; slack also meets the timeouts that
    requests ask for, where the device can. fifo and shortest are for comparison: the oldest image first, or the one
    with the least work left, whatever its level; others may starve."""
    prompt_cache_bytes: int = Field(default=256 * 2**20, ge=0)
    """Device memory for the cache of prompt embeddings, in bytes."""
    lora_cache_bytes: Annotated[int, Env("LORA_CACHE_BYTES")] = Field(default=2**30, ge=0)
    """Device memory for LoRA adapters, in bytes; the least recently used ones are dropped. Those of images in flight
    may exceed it, and their forwards need a copy in addition."""
    lora_max_bytes: int = Field(default=2 * 2**30, ge=0)
    """Limit on the file of a LoRA adapter, in bytes."""
    lora_max_rank: int = Field(default=256, ge=1, le=4096)
    """Limit on the rank of a LoRA adapter."""
    save_test_images: Annotated[Path | None, Env("SAVE_TEST_IMAGES")] = None
    """Folder for a copy of every image, named by task id; `true` selects a folder in the temporary directory."""

    def padding_limit(self, device_type: str) -> float:
        """Return the effective `max_padding` on a device type in torch's notation."""
        if self.max_padding is not None:
            return self.max_padding
        # Padding changes float32 attention in its last bit. Rounding to int8 makes that a level of one in 127.
        return 0.25 if device_type == "cpu" and self.dtype != "int8" else 0.0

    @field_validator("compiled")
    @classmethod
    def _check_compiled(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("offload") == "blocks":
            raise ValueError("blocks whose weights come and go cannot be compiled; choose another FLUX_OFFLOAD")
        return value

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
    """Defaults of the limits for one model size."""

    max_num_seqs: int
    gpu_tokens: int
    """Tokens per forward on a GPU: enough for full utilization, few enough for short waits."""
    cpu_tokens: int
    """Tokens per forward on a CPU."""
    prefix_cache_bytes: int


SIZE_LIMITS = {
    "0.6B": SizeLimits(256, gpu_tokens=16_384, cpu_tokens=1_024, prefix_cache_bytes=256 * 2**20),
    "4B": SizeLimits(128, gpu_tokens=8_192, cpu_tokens=256, prefix_cache_bytes=512 * 2**20),
    "8B": SizeLimits(64, gpu_tokens=4_096, cpu_tokens=128, prefix_cache_bytes=512 * 2**20),
}
"""Defaults by size of Qwen3-Reranker; docs/operating.md has the reasons."""
DEFAULT_LIMITS = SIZE_LIMITS["0.6B"]


class RerankSettings(ModelSettings):
    """Settings of the `rerank` model."""

    model_path: Annotated[Path, Env("RERANK_MODEL_PATH")]
    """A reranker folder in transformers or sentence-transformers format; or, with `model_size`, the parent of the
    Qwen3-Reranker folders."""
    threads: Annotated[int, Env("RERANK_THREADS")] = Field(default=0, ge=0, le=1024)
    """CPU threads per worker; 0 selects torch's default, which OMP_NUM_THREADS sets."""
    dtype: Annotated[RerankDType, Env("RERANK_DTYPE")] = "auto"
    """dtype of the weights; auto is bfloat16 on a GPU and float32 on a CPU. int8 is for CPUs: matrix products are in
    int8, everything else in float32."""
    compiled: Annotated[bool | Literal["auto"], Env("RERANK_COMPILE")] = "auto"
    """Use torch.compile to fuse the operators between matrix products; the start takes longer. auto does so on a
    GPU."""
    model_size: Annotated[Literal["0.6B", "4B", "8B"] | None, Env("MODEL_SIZE")] = None
    """Selects the checkpoint folder below `model_path`, and the defaults of the limits below."""
    engine: Annotated[Literal["torch", "vllm"], Env("ENGINE")] = "torch"
    """Inference engine; vllm serves causal rerankers and requires the package vllm."""
    max_num_seqs: Annotated[int, Env("MAX_NUM_SEQS")] = Field(default=DEFAULT_LIMITS.max_num_seqs, ge=1, le=65_536)
    """Limit on the pairs of query and document per forward; the default is lower for larger models."""
    max_num_batched_tokens: Annotated[int, Env("MAX_NUM_BATCHED_TOKENS")] = Field(default=0, ge=0)
    """Limit on the tokens per forward, including padding; a single pair may exceed it. 0 selects 16,384 on a GPU and
    1,024 on a CPU, or less for larger models: enough for full utilization, few enough for short waits."""
    gpu_memory_utilization: Annotated[float, Env("GPU_MEMORY_UTILIZATION")] = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory for an instance. vLLM allocates all of it; torch is limited to it only if it is set."""
    tensor_parallel_size: Annotated[int, Env("TENSOR_PARALLEL_SIZE")] = Field(default=1, ge=1, le=64)
    """GPUs that share the model of one instance; vLLM only."""
    gpu_groups: tuple[tuple[int, ...], ...] = ()
    """Groups of those GPUs, like ``0,1;2,3``; `genserve serve` writes them. The instance's own GPU is the first of its
    group. Without groups, it is the instance's own GPU and the ones after it."""
    max_length: int = Field(default=0, ge=0)
    """Limit on the tokens of one pair; 0 selects the checkpoint's limit."""
    max_waiting_requests: int = Field(default=64, ge=1, le=10_000)
    """Requests that an instance holds; more of them wait in Triton's queue."""
    max_held_batches: int = Field(default=8, ge=1, le=10_000)
    """Tokens that an instance holds, in full forwards; requests beyond them wait in Triton's queue."""

    prefix_cache_bytes: int = Field(default=DEFAULT_LIMITS.prefix_cache_bytes, ge=0)
    """Device memory for the keys and values of common prompt prefixes of a causal reranker, in bytes; 0 disables the
    cache. The default is higher for larger models. vLLM on a GPU uses the rest of `gpu_memory_utilization` instead."""

    score_cache_bytes: Annotated[int, Env("SCORE_CACHE_BYTES")] = Field(default=64 * 2**20, ge=0)
    """Memory for the cache of scores by query and document, in bytes; 0 disables it."""

    @model_validator(mode="before")
    @classmethod
    def _sized(cls, values: Any) -> Any:
        """Apply `model_size` to the path and to the limits that are not set."""
        limits = SIZE_LIMITS.get(str(values.get("model_size")))
        if not limits:
            return values
        path = Path(str(values.get("model_path", "")))
        if "model_path" in values and not any((path / name).is_file() for name in _CHECKPOINT_FILES):
            values = {**values, "model_path": path / f"Qwen3-Reranker-{values['model_size']}"}
        return {"max_num_seqs": limits.max_num_seqs, "prefix_cache_bytes": limits.prefix_cache_bytes, **values}

    @field_validator("engine")
    @classmethod
    def _check_torch_only(cls, value: str, info: ValidationInfo) -> str:
        if value == "vllm" and info.data.get("dtype") == "int8":
            raise ValueError("int8 works with torch only; choose another RERANK_DTYPE")
        if value == "vllm" and info.data.get("compiled") is True:
            raise ValueError("RERANK_COMPILE works with torch only; vLLM decides itself what to compile")
        return value

    @field_validator("compiled")
    @classmethod
    def _check_compiled(cls, value: bool | str, info: ValidationInfo) -> bool | str:
        if value is True and info.data.get("dtype") == "int8":
            raise ValueError("int8 cannot be compiled; choose another RERANK_DTYPE")
        return value

    @field_validator("gpu_groups", mode="before")
    @classmethod
    def _groups(cls, value: object) -> object:
        return [group.split(",") for group in value.split(";")] if isinstance(value, str) else value

    @field_validator("tensor_parallel_size")
    @classmethod
    def _check_vllm_only(cls, value: int, info: ValidationInfo) -> int:
        if value > 1 and info.data.get("engine") == "torch":
            raise ValueError("several GPUs per instance require ENGINE=vllm")
        return value

    def compiles(self, device: str) -> bool:
        """Return whether to compile the model, for a device in torch's notation."""
        if self.compiled == "auto":
            return device.startswith("cuda") and self.dtype != "int8"
        return self.compiled

    def token_budget(self, device: str) -> int:
        """Return the limit on the tokens per forward, for a device in torch's notation."""
        limits = SIZE_LIMITS[self.model_size] if self.model_size else DEFAULT_LIMITS
        return self.max_num_batched_tokens or (limits.gpu_tokens if device.startswith("cuda") else limits.cpu_tokens)

    def sized(self, device: str) -> Mapping[str, Any]:
        """Return the limits that follow from `model_size` unless they are set, for a device in torch's notation."""
        if not self.model_size:
            return {}
        limits = {name: getattr(self, name) for name in ("max_num_seqs", "prefix_cache_bytes")}
        return {**limits, "max_num_batched_tokens": self.token_budget(device)}

    @property
    def memory_share(self) -> float | None:
        """Limit on torch's share of a GPU's memory, or None."""
        is_set = self.engine == "torch" and "gpu_memory_utilization" in self.model_fields_set
        return self.gpu_memory_utilization if is_set else None

    def gpus(self, device: str) -> tuple[int, ...]:
        """Return the GPUs of a worker on `device`; with vLLM those of its group."""
        own = super().gpus(device)
        if self.engine == "torch" or not own:
            return own
        first = own[0]
        following = tuple(range(first, first + self.tensor_parallel_size))
        return next((group for group in self.gpu_groups if group[0] == first), following)


_CHECKPOINT_FILES = ("config.json", "modules.json")
"""A checkpoint folder has one of these."""


SettingsT = TypeVar("SettingsT", bound=ModelSettings)


def weights_dtype(dtype: FluxDType | RerankDType, device: str) -> WeightsDType:
    """Return the dtype to load weights in: auto is bfloat16 on a GPU and float32 on a CPU.

    Quantized weights are made from those in another dtype: fp8 from bfloat16, int8 from float32, int8wo from auto's.
    """
    match dtype:
        case "auto" | "int8wo":
            return "bfloat16" if device.startswith("cuda") else "float32"
        case "fp8":
            return "bfloat16"
        case "int8":
            return "float32"
        case _:
            return dtype


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
        repository: The model repository, the base of relative paths in ``parameters {}``.
        environ: The environment with the overrides.

    Raises:
        SettingsError: A value is missing, unknown or out of range.
    """
    values, origin = _given(kind, parameters, environ)
    try:
        for name in RELATIVE_PATHS:
            if values.get(name) and origin[name] == CONFIG_FILE:
                values[name] = str((repository / values[name]).resolve())
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "?"
        where = origin.get(name, CONFIG_FILE)
        label = where if where != CONFIG_FILE else f"parameter {name} in config.pbtxt"
        raise SettingsError(f"{label}: {first['msg']} (value: {values.get(name)!r})") from None


def in_force(
    settings: ModelSettings,
    parameters: Mapping[str, str],
    *,
    device: str,
    environ: Mapping[str, str] = os.environ,
) -> list[SettingInForce]:
    """Return every setting of a model with its source.

    Args:
        settings: The settings that `load` returned for these parameters and this environment.
        parameters: The ``parameters {}`` of the model's config.pbtxt.
        device: The device of the instance, in torch's notation.
        environ: The environment with the overrides.
    """
    _, origin = _given(type(settings), parameters, environ)
    sized = {name: value for name, value in settings.sized(device).items() if name not in origin}
    values = {**settings.model_dump(mode="json"), **sized}

    def source(name: str) -> str:
        where = origin.get(name)
        if where is None:
            return "MODEL_SIZE" if name in sized else "default"
        return where if where == CONFIG_FILE else f"environment {where}"

    return [SettingInForce(name, value, source(name)) for name, value in values.items()]


def _given(
    kind: type[ModelSettings], parameters: Mapping[str, str], environ: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the values that are set, and the origin of each: a variable's name, or config.pbtxt."""
    values = dict(parameters)
    origin = dict.fromkeys(values, CONFIG_FILE)
    for name, field in kind.model_fields.items():
        for env in (mark for mark in field.metadata if isinstance(mark, Env)):
            if environ.get(env, "") != "":
                values[name], origin[name] = environ[env], str(env)
    return values, origin
