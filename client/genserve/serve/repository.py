"""Rendering of the model repository with settings from the environment and the command line.

Triton's configuration cannot read the environment. Each model is therefore rendered into the server's state folder:
``config.pbtxt`` is adjusted, everything else is linked.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from genserve.serve.options import ServeError, ServeOptions
from genserve_backend.checkpoints import CheckpointError
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.settings import (
    HANG_TIMEOUT_S,
    RELATIVE_PATHS,
    FluxSettings,
    ModelSettings,
    RerankSettings,
    SettingsError,
    load,
)

CHECKPOINTS: dict[str, tuple[type[ModelSettings], Callable[[Path], object]]] = {
    "flux": (FluxSettings, FluxCheckpoint.load),
    "rerank": (RerankSettings, RerankCheckpoint.load),
}
"""Settings class and checkpoint loader of each model with a checkpoint."""
SUPPORT = ("tasks",)
"""Models that are always served."""
GPU_ENV = {"flux": "FLUX_GPUS", "rerank": "RERANK_GPUS"}
INSTANCE_ENV = {"flux": "FLUX_WORKERS", "rerank": "WORKERS"}


@dataclass(frozen=True)
class Rendered:
    """Rendered repository.

    Attributes:
        models: Names of the served models.
        hang_timeout_s: The longest `hang_timeout_s` of the models.
    """

    models: tuple[str, ...]
    hang_timeout_s: float


def render(options: ServeOptions, target: Path, environ: Mapping[str, str] = os.environ) -> Rendered:
    """Write the repository to serve into `target`.

    Raises:
        ServeError: The repository, a setting or a checkpoint is not usable.
    """
    names = _chosen(options)
    timeouts = []
    for name in names:
        source = options.repository / name
        config = read_config(source / "config.pbtxt")
        if name in CHECKPOINTS:
            settings = _check(name, config, options.repository, environ)
            timeouts.append(settings.hang_timeout_s)
            _place(name, config, options, environ, settings)
            _limit(config, settings, environ)
        folder = target / name
        folder.mkdir(parents=True)
        (folder / "config.pbtxt").write_text(text_format.MessageToString(config))
        for item in source.iterdir():
            if item.name != "config.pbtxt":
                (folder / item.name).symlink_to(item.resolve())
    return Rendered(tuple(names), hang_timeout_s=max(timeouts, default=HANG_TIMEOUT_S))


def _chosen(options: ServeOptions) -> list[str]:
    repository = options.repository
    if not repository.is_dir():
        raise ServeError(f"no model repository at {repository} (give --repository)")
    present = sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))
    if not present:
        raise ServeError(f"no models in {repository}: no folder there has a config.pbtxt")
    unknown = [name for name in (*options.models, *options.instances) if name not in present]
    if unknown:
        raise ServeError(f"no model {unknown[0]} in {repository}, which has {', '.join(present)}")
    return [name for name in present if not options.models or name in options.models or name in SUPPORT]


def read_config(path: Path) -> Any:
    """Return a model's Triton configuration.

    Raises:
        ServeError: The file is missing, unreadable or no configuration.
    """
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except (OSError, UnicodeDecodeError) as error:
        raise ServeError(f"cannot read {path}: {error}") from None
    except text_format.ParseError as error:
        raise ServeError(f"{path} is not a Triton configuration: {error}") from None


def parse_settings(name: str, config: Any, repository: Path, environ: Mapping[str, str]) -> ModelSettings:
    """Return the settings of a model with a checkpoint.

    Raises:
        ServeError: A setting is not usable.
    """
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    try:
        return load(CHECKPOINTS[name][0], parameters, repository=repository, environ=environ)
    except SettingsError as error:
        raise ServeError(f"{name}: {error}") from None


def _check(name: str, config: Any, repository: Path, environ: Mapping[str, str]) -> ModelSettings:
    """Check settings and checkpoint before Triton starts, and write absolute paths."""
    settings = parse_settings(name, config, repository, environ)
    try:
        CHECKPOINTS[name][1](settings.model_path)
    except CheckpointError as error:
        raise ServeError(f"{name}: {error}") from None
    for key in RELATIVE_PATHS:
        if path := getattr(settings, key, None):
            config.parameters[key].string_value = str(path.absolute())
    return settings


def _place(name: str, config: Any, options: ServeOptions, environ: Mapping[str, str], settings: ModelSettings) -> None:
    """Place the instances: on each device, or on the first of each tensor-parallel group."""
    gpus = options.gpus if options.gpus is not None else _gpus_from(GPU_ENV[name], environ)
    if isinstance(settings, RerankSettings) and settings.tensor_parallel_size > 1:
        groups = _groups(_all_gpus() if gpus is None else gpus, settings.tensor_parallel_size)
        config.parameters["gpu_groups"].string_value = ";".join(",".join(map(str, group)) for group in groups)
        gpus = tuple(group[0] for group in groups)
    count = options.instances.get(name) or instance_count(name, environ)
    for group in config.instance_group:
        group.count = count
        if gpus:
            group.kind = model_config_pb2.ModelInstanceGroup.KIND_GPU
            group.gpus[:] = gpus


def instance_count(name: str, environ: Mapping[str, str]) -> int:
    """Return the instances per device that the environment asks for.

    Raises:
        ServeError: It is not a whole number, at least 1.
    """
    return _number(INSTANCE_ENV[name], environ, 1)


def _limit(config: Any, settings: ModelSettings, environ: Mapping[str, str]) -> None:
    """Apply the queue size and the queue timeout of the environment."""
    policy = config.dynamic_batching.default_queue_policy
    policy.max_queue_size = _number("MAX_GLOBAL_QUEUE_SIZE", environ, policy.max_queue_size)
    if environ.get("TASK_TIMEOUT"):
        policy.default_timeout_microseconds = round(settings.task_timeout_s * 1e6)


def parse_gpus(text: str) -> tuple[int, ...] | None:
    """Parse GPU ids such as ``0,1,2``. Return None for an empty text.

    Raises:
        ValueError: A part is not a GPU id.
    """
    ids = tuple(int(part) for part in text.replace(" ", "").split(",") if part)
    if any(gpu < 0 for gpu in ids):
        raise ValueError(text)
    return ids or None


def _groups(gpus: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    if not gpus or len(gpus) % size:
        listed = f"the {len(gpus)} GPUs {','.join(map(str, gpus))}" if gpus else "the GPUs: there are none"
        raise ServeError(f"rerank: TENSOR_PARALLEL_SIZE is {size}, which does not divide {listed}")
    return [gpus[start : start + size] for start in range(0, len(gpus), size)]


def _all_gpus() -> tuple[int, ...]:
    """Return the ids of all GPUs that torch sees, which are those that Triton finds."""
    # In another process: this one must have a single thread when it starts Triton.
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    counted = subprocess.run(command, capture_output=True, text=True, check=False)
    return tuple(range(int(counted.stdout))) if counted.returncode == 0 else ()


def _gpus_from(name: str, environ: Mapping[str, str]) -> tuple[int, ...] | None:
    try:
        return parse_gpus(environ.get(name, ""))
    except ValueError:
        raise ServeError(f"{name} is {environ[name]!r}; allowed: GPU ids as in 0,1") from None


def _number(name: str, environ: Mapping[str, str], default: int) -> int:
    text = environ.get(name, "")
    if not text:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise ServeError(f"{name} is {text!r}; allowed: a whole number, at least 1")
    return int(text)
