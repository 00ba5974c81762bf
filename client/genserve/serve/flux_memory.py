"""Memory that FLUX needs on each device, against what the device has, with settings that make it fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from genserve.serve.checkpoint_check import Contents
from genserve.serve.device_memory import Device
from genserve.serve.finding import Finding, in_units
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.dtypes import FORMS, unsupported
from genserve_backend.flux.memory import Sizes, advise, need
from genserve_backend.settings import Env, FluxSettings, weights_dtype


def flux_memory(
    contents: Contents, devices: Sequence[Device], instances: int, settings: FluxSettings
) -> Iterator[Finding]:
    """Yield a finding for each device. Weights that do not fit are a failure; forwards that may not fit, a warning.

    Args:
        contents: The checkpoint's weights.
        devices: The devices of the instances.
        instances: Instances per device.
        settings: The model's settings.
    """
    values = {
        part: {tensor.name: tensor.values for tensor in weights.tensors} for part, weights in contents.weights.items()
    }
    sizes = Sizes.read(FluxCheckpoint.load(settings.model_path), values)
    for device in devices:
        yield _fit(sizes, device, instances, settings, at_least="at least " if contents.problems else "")


def _fit(sizes: Sizes, device: Device, instances: int, settings: FluxSettings, *, at_least: str) -> Finding:
    if reason := unsupported(settings.dtype, device.name, capability=device.capability, has_int8=has_int8(device.name)):
        return Finding("flux", "fail", reason)
    found = need(sizes, settings, device.name)
    weights, total = instances * (found.weights + found.passing), instances * found.total
    dtype = settings.dtype if settings.dtype in FORMS else weights_dtype(settings.dtype, device.name)
    takes = f"weights take {at_least}{in_units(found.weights + found.passing)} in {dtype}"
    takes += f", {in_units(weights)} for {instances} instances" if instances > 1 else ""
    takes += f", besides {in_units(instances * found.host)} in host memory" if found.host else ""
    has = f"{device.name} has {in_units(device.free)} of {in_units(device.total)} free"
    on_gpu = device.name.startswith("cuda")
    advice = _advice(sizes, settings, device, instances) if on_gpu and total > device.total else ""
    if weights > device.total:
        return Finding("flux", "fail", f"{takes}: too much for {device.name} with {in_units(device.total)}{advice}")
    if weights > device.free:
        return Finding("flux", "warn", f"{takes}, and {has}: end what else uses it, perhaps a running server")
    if advice:
        forwards = f"with forwards at the limits about {in_units(total)}, reckoned"
        return Finding("flux", "warn", f"{takes}, {forwards}; {has}{advice}")
    return Finding("flux", "ok", f"{takes}; {has}")


def _advice(sizes: Sizes, settings: FluxSettings, device: Device, instances: int) -> str:
    changes = advise(sizes, settings, device.name, memory=device.total / instances, capability=device.capability)
    if changes is None:
        return ": no setting makes it fit" + (", unless FLUX_WORKERS is less" if instances > 1 else "")
    return f": it fits with {describe(changes)}"


def describe(changes: Mapping[str, Any]) -> str:
    """Return fields of `FluxSettings` as environment variables, like ``FLUX_OFFLOAD=idle FLUX_VAE_TILING=true``."""
    fields = FluxSettings.model_fields
    named = {
        next(str(mark) for mark in fields[name].metadata if isinstance(mark, Env)): changes[name] for name in changes
    }
    return " ".join(f"{name}={str(value).lower()}" for name, value in named.items())


def has_int8(device: str) -> bool:
    """Return whether a device, in torch's notation, is a CPU that has VNNI."""
    if device != "cpu":
        return False
    try:
        from genserve_backend import matrices
    except ModuleNotFoundError:  # without torch, doctor has said so
        return True
    return matrices.has_int8()
