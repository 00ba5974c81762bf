"""`genserve doctor`: checks of this machine's requirements for serving, and of the models."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from genserve.serve.finding import Finding
from genserve.serve.model_check import FILE_CHECKS, check_models
from genserve.serve.options import ServeError, ServeOptions, cache_folder, make_folder, state_folder
from genserve.serve.ports import check_ports
from genserve.serve.process import SHM_FOLDER
from genserve.serve.state import ServerState
from genserve.serve.triton import find_libpython, platform_version
from genserve.serve.wheels import TRITON, check_platform, on_path
from genserve.types import ServerStatus

MIN_SHM_BYTES = 256 * 2**20
"""Several images at once need this much shared memory. Docker's default of 64 MB is too small."""

MODELS = tuple(FILE_CHECKS)
"""Models that can be checked."""


def examine(http_port: int, *, model: str | None = None, trial_s: float | None = None) -> Iterator[Finding]:
    """Check this machine, then the models, and yield each finding as soon as it is there.

    Args:
        http_port: HTTP port of the server to start.
        model: The only model to check; None checks all.
        trial_s: Time limit of the trial of a model, in seconds; None for no trials.
    """
    options = ServeOptions(http_port=http_port)
    for check in CHECKS:
        yield from _guarded(check, options)
    yield from check_models((model,) if model else MODELS, options, trial_s=trial_s)


def examine_servers(servers: Iterable[ServerStatus]) -> list[Finding]:
    """Check that each server and each of its models is ready."""
    findings = []
    for server in servers:
        state = "ready" if server.ready else "not ready" if server.live else "not reachable"
        findings.append(Finding(server.url, "ok" if server.ready else "fail", state))
        findings += [
            Finding(model.name, "ok" if model.state == "READY" else "fail", f"{model.state} {model.reason}".strip())
            for model in server.models
        ]
    return findings


def _guarded(check: Callable[[ServeOptions], Iterator[Finding]], options: ServeOptions) -> list[Finding]:
    subject = check.__name__.strip("_")
    try:
        return list(check(options))
    except ServeError as error:
        return [Finding(subject, "fail", str(error))]


def _platform(_: ServeOptions) -> Iterator[Finding]:
    if on_path("tritonserver"):
        yield Finding("platform", "ok", "tritonserver is installed; any platform that runs it is supported")
        return
    check_platform(TRITON)
    yield Finding("platform", "ok", "Linux on x86_64 with a glibc that the embedded Triton supports")


def _python(_: ServeOptions) -> Iterator[Finding]:
    if on_path("tritonserver"):
        yield Finding("python", "ok", f"Python {platform_version()}; the installed Triton has its own interpreter")
        return
    yield Finding("python", "ok", f"Python {platform_version()} with {find_libpython()}")


def _triton(_: ServeOptions) -> Iterator[Finding]:
    installed = on_path("tritonserver")
    folder = cache_folder() / TRITON.folder_name
    if installed:
        yield Finding("triton", "ok", str(installed))
    elif folder.is_dir():
        yield Finding("triton", "ok", f"embedded, in {folder}")
    else:
        make_folder(cache_folder(), setting="GENSERVE_CACHE_DIR")
        yield Finding("triton", "warn", f"not fetched yet; the first `genserve serve` fetches it into {folder}")


def _torch(_: ServeOptions) -> Iterator[Finding]:
    try:
        import torch
    except ModuleNotFoundError:
        yield Finding("torch", "fail", "not installed: pip install 'genserve[serve]'")
        return
    if not torch.cuda.is_available():
        built = torch.version.cuda
        detail = f"{torch.__version__}, no usable GPU: models run on the CPU"
        yield Finding("torch", "warn" if built and Path("/dev/nvidiactl").exists() else "ok", detail)
        return
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    yield Finding("torch", "ok", f"{torch.__version__}, {len(names)} GPU(s): {', '.join(names)}")


def _memory(_: ServeOptions) -> Iterator[Finding]:
    if not SHM_FOLDER.is_dir():
        yield Finding("shm", "fail", f"no {SHM_FOLDER}, which Triton's Python backend requires")
        return
    total = shutil.disk_usage(SHM_FOLDER).total
    small = total < MIN_SHM_BYTES
    advice = "; too small for several images at once (docker run --shm-size=1g)" if small else ""
    yield Finding("shm", "warn" if small else "ok", f"{total / 2**20:.0f} MiB in {SHM_FOLDER}{advice}")


def _folders(options: ServeOptions) -> Iterator[Finding]:
    folder = make_folder(state_folder(options.http_port).parent, setting="GENSERVE_STATE_DIR")
    yield Finding("state", "ok", str(folder))


def _ports(options: ServeOptions) -> Iterator[Finding]:
    running = ServerState.of(options.http_port).process()
    if running:
        yield Finding("ports", "ok", f"a server runs on HTTP port {options.http_port} (process {running.pid})")
        return
    check_ports(options)
    yield Finding("ports", "ok", ", ".join(map(str, options.ports.values())) + " are free")


CHECKS: tuple[Callable[[ServeOptions], Iterator[Finding]], ...] = (
    _platform,
    _python,
    _triton,
    _torch,
    _memory,
    _folders,
    _ports,
)
