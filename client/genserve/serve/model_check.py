"""Checks of one model: settings, files, memory, and on request a trial."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tritonclient.grpc import model_config_pb2

from genserve.serve.checkpoint_check import Contents, check_flux, check_rerank
from genserve.serve.device_memory import Device, find_cpu, find_gpus
from genserve.serve.finding import Finding, in_units
from genserve.serve.flux_memory import flux_memory
from genserve.serve.load_trial import TrialError, try_model
from genserve.serve.options import ServeError, ServeOptions
from genserve.serve.repository import parse_settings, read_config, render
from genserve_backend.checkpoints import CheckpointError
from genserve_backend.settings import FluxSettings, ModelSettings, RerankSettings, weights_dtype

FILE_CHECKS: dict[str, Callable[[Path], Contents]] = {"flux": check_flux, "rerank": check_rerank}
"""Check of the files of each model with a checkpoint."""


@dataclass(frozen=True)
class Placement:
    """Devices of a model's instances.

    Attributes:
        first: Name of the first instance's device.
        devices: All devices.
        instances: Instances per device.
    """

    first: str
    devices: tuple[Device, ...]
    instances: int


def check_models(models: Sequence[str], options: ServeOptions, *, trial_s: float | None) -> Iterator[Finding]:
    """Yield the findings about each model. A failure of a check is a finding too.

    Args:
        models: Names of models, keys of `FILE_CHECKS`.
        options: The repository and the placement of a server.
        trial_s: Time limit of the trial of a model, in seconds; None for no trials.
    """
    gpus = find_gpus()
    for model in models:
        yield from _guarded(model, options, gpus, trial_s)


def _guarded(model: str, options: ServeOptions, gpus: Sequence[Device], trial_s: float | None) -> Iterator[Finding]:
    try:
        yield from _check(model, options, gpus, trial_s)
    except (ServeError, CheckpointError, TrialError) as error:
        yield Finding(model, "fail", str(error).removeprefix(f"{model}: "))
    except BaseException as error:  # damaged files surprise every parser; a panic in Rust is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        yield Finding(model, "fail", f"the check ended with {type(error).__name__}: {error}")


def _check(model: str, options: ServeOptions, gpus: Sequence[Device], trial_s: float | None) -> Iterator[Finding]:
    settings = _settings(model, options.repository)
    contents = FILE_CHECKS[model](settings.model_path)
    for problem in dict.fromkeys(contents.problems):
        yield Finding(model, "fail", problem)
    try:
        config, settings = _rendered(model, options)
    except ServeError:
        # A loader finds the same missing files. It reports the first one only, and with fewer words.
        if contents.problems:
            return
        raise
    if not contents.problems:
        counted = f"{contents.files} files, {contents.tensors:,} tensors"
        yield Finding(model, "ok", f"checkpoint in {settings.model_path}: {counted}")
    placement = _place(config, settings, gpus)
    fits = list(_memory(model, contents, placement, settings))
    yield from fits
    # A model that cannot fit would make the system end other processes, perhaps those of a server.
    if trial_s is not None and all(fit.state != "fail" for fit in fits):
        yield Finding(model, "ok", try_model(model, settings, placement.first, timeout_s=trial_s))


def _settings(model: str, repository: Path) -> ModelSettings:
    return parse_settings(model, read_config(repository / model / "config.pbtxt"), repository, os.environ)


def _rendered(model: str, options: ServeOptions) -> tuple[Any, ModelSettings]:
    """Return the model's configuration as a server would render it, and its settings with that configuration."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "repository"
        render(replace(options, models=(model,)), target, os.environ)
        return read_config(target / model / "config.pbtxt"), _settings(model, target)


def _place(config: Any, settings: ModelSettings, gpus: Sequence[Device]) -> Placement:
    """Return the devices that Triton gives to the instances.

    Raises:
        ServeError: There is no such GPU.
    """
    kinds = model_config_pb2.ModelInstanceGroup
    wanted: list[int] = []
    count = 1
    for group in config.instance_group:
        count = max(1, group.count)
        if group.kind in {kinds.KIND_GPU, kinds.KIND_AUTO}:
            wanted += group.gpus or range(len(gpus))
        if group.kind == kinds.KIND_GPU and not (group.gpus or gpus):
            raise ServeError("config.pbtxt asks for GPUs, and torch finds none")
    # With tensor parallelism, an instance has GPUs besides its own.
    used = sorted({gpu for own in wanted for gpu in settings.gpus(f"cuda:{own}")})
    missing = [gpu for gpu in used if gpu >= len(gpus)]
    if missing:
        raise ServeError(f"no GPU {missing[0]}: torch finds {len(gpus)}")
    if not used:
        return Placement("cpu", (find_cpu(),), count)
    return Placement(f"cuda:{wanted[0]}", tuple(gpus[gpu] for gpu in used), count)


def _memory(model: str, contents: Contents, placement: Placement, settings: ModelSettings) -> Iterator[Finding]:
    """Compare the weights with the memory of each device."""
    if isinstance(settings, FluxSettings):
        yield from flux_memory(contents, placement.devices, placement.instances, settings)
    if not isinstance(settings, RerankSettings):
        return
    shards = settings.tensor_parallel_size
    dtype = weights_dtype(settings.dtype, placement.devices[0].name)
    each = contents.loaded_bytes(dtype) / shards
    needed = each * placement.instances
    takes = f"weights take {'at least ' if contents.problems else ''}{in_units(each)} in {dtype}"
    takes += f", {in_units(needed)} for {placement.instances} instances" if placement.instances > 1 else ""
    yield from (_fit(model, device, needed, takes) for device in placement.devices)


def _fit(model: str, device: Device, needed: float, takes: str) -> Finding:
    has = f"{device.name} has {in_units(device.free)} of {in_units(device.total)} free"
    if needed > device.total:
        return Finding(model, "fail", f"{takes}: too much for {device.name} with {in_units(device.total)}")
    if needed > device.free:
        return Finding(model, "warn", f"{takes}, and {has}: end what else uses it, perhaps a running server")
    return Finding(model, "ok", f"{takes}; {has}")
