"""Location of tritonserver, and its command line and environment."""

from __future__ import annotations

import os
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import genserve_backend
from genserve.serve.options import ServeError, ServeOptions
from genserve.serve.wheels import STUB_NUMPY, TRITON, fetch, on_path
from genserve_backend.worker.link import WORKER_PATH_ENV

STUB = "triton_python_backend_stub"
NVIDIA_DEVICE = Path("/dev/nvidiactl")
WITHOUT_GPU = ("--allow-gpu-metrics=false", "--pinned-memory-pool-byte-size=0")
"""Arguments that avoid Triton's errors about a missing driver."""


@dataclass(frozen=True)
class Triton:
    """Installed tritonserver.

    Attributes:
        binary: Path of tritonserver.
        source: Origin of the installation, for the log.
        arguments: Additional command-line arguments.
        environment: Additional environment variables.
        folder: Working folder for the start; stubs import from it first. None keeps the current one.
    """

    binary: Path
    source: str
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None

    def command(self, options: ServeOptions, *, repository: Path, shm_prefix: str) -> list[str]:
        """Return the command line of the server."""
        info = "true" if options.verbose else "false"
        # IPv6 addresses: libevent's notation for HTTP, URL notation for gRPC.
        http_host = f"ipv6:{options.host}" if options.is_ipv6 else options.host
        grpc_host = f"[{options.host}]" if options.is_ipv6 else options.host
        return [
            str(self.binary),
            f"--model-repository={repository}",
            f"--http-address={http_host}",
            f"--http-port={options.http_port}",
            f"--grpc-address={grpc_host}",
            f"--grpc-port={options.grpc_port}",
            f"--metrics-address={http_host}",
            f"--metrics-port={options.metrics_port}",
            "--model-control-mode=none",
            "--disable-auto-complete-config",
            # Keep running after a failed load, so that the model's name and reason can be reported.
            "--exit-on-error=false",
            f"--exit-timeout-secs={options.exit_timeout_s}",
            f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
            f"--log-info={info}",
            "--log-format=ISO8601",
            *([] if NVIDIA_DEVICE.exists() else WITHOUT_GPU),
            *self.arguments,
        ]


def find_triton() -> Triton:
    """Return the tritonserver on PATH, as in NVIDIA's container, else the embedded one, fetched if necessary.

    Raises:
        ServeError: The platform is not supported, or the fetch failed.
    """
    installed = on_path("tritonserver")
    return Triton(installed, source="PATH") if installed else embedded_triton()


def embedded_triton() -> Triton:
    """Return the tritonserver of the nvidia-pytriton wheel, configured for the running Python.

    Raises:
        ServeError: The platform or this Python is not supported, or the fetch failed.
    """
    library = find_libpython()
    folder = fetch(TRITON)
    numpy = fetch(STUB_NUMPY)
    server = folder / "pytriton" / "tritonserver"
    binary = server / "bin" / "tritonserver"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    libraries = os.pathsep.join(filter(None, [str(library.parent), os.environ.get("LD_LIBRARY_PATH")]))
    return Triton(
        binary,
        source=f"{TRITON.name} {TRITON.version}",
        arguments=(
            f"--backend-directory={_backends(server)}",
            f"--cache-directory={server / 'caches'}",
        ),
        folder=numpy,
        environment={
            # The stub embeds this library's interpreter and takes the first python3 on PATH as its executable.
            "PATH": path,
            "LD_LIBRARY_PATH": libraries,
            "PYTHONPATH": os.pathsep.join([str(numpy), *_import_path()]),
            WORKER_PATH_ENV: os.pathsep.join(_import_path()),
        },
    )


def find_libpython() -> Path:
    """Return the running Python's shared library, which Triton's stub links.

    Raises:
        ServeError: This Python has no shared library, or Triton has no stub for its version.
    """
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        raise ServeError(
            f"the embedded Triton runs with Python 3.10 to 3.12, not {platform_version()}: its binaries need numpy 1,"
            " which has no build for other versions; use one of those, or the container"
        )
    name = f"libpython{platform_version()}.so.1.0"
    folders = [sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib"]
    multiarch = sysconfig.get_config_var("MULTIARCH")
    folders += [f"/usr/lib/{multiarch}"] if multiarch else []
    for folder in filter(None, folders):
        if (Path(folder) / name).exists():
            return Path(folder) / name
    raise ServeError(
        f"{sys.base_prefix} has no {name}, which Triton needs: on Debian and Ubuntu install"
        f" libpython{platform_version()}, elsewhere use a Python built with --enable-shared"
    )


def platform_version() -> str:
    """Return the running Python's version, as in 3.12."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _backends(server: Path) -> Path:
    """Return a backend folder with the running Python's stub. Each version has its own; the cache is shared."""
    version = platform_version()
    backends = server / f"backends-{version}"
    python = backends / "python"
    wanted = {path.name: path for path in (server / "backends" / "python").iterdir() if path.is_file()}
    wanted[STUB] = server / "python_backend_stubs" / version / STUB
    for name, source in wanted.items():
        link = python / name
        if link.exists():
            continue
        try:
            python.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(source, python))
        except FileExistsError:
            pass  # another server created it at the same time
        except OSError as error:
            raise ServeError(f"cannot set up {backends}: {error.strerror}") from None
    return backends


def _import_path() -> list[str]:
    """Return the import path: this environment's packages and our own, which an editable install keeps elsewhere."""
    own = [str(Path(genserve_backend.__path__[0]).parent)]
    packages = [entry for entry in sys.path if Path(entry).name in {"site-packages", "dist-packages"}]
    return list(dict.fromkeys([*own, *packages]))
