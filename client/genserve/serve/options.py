"""Options of `genserve serve`, and the cache and state folders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


class ServeError(Exception):
    """Failure to start, stop or find a server, with a one-line reason."""


@dataclass(frozen=True)
class ServeOptions:
    """Options of one server.

    Attributes:
        host: Address that all endpoints bind to.
        http_port: Port of the HTTP endpoint.
        grpc_port: Port of the gRPC endpoint.
        metrics_port: Port of the metrics endpoint.
        gateway_port: Port of the gateway; None starts none.
        repository: The model repository.
        gpus: GPU ids for every model; None leaves the choice to Triton.
        models: Names of the models to serve; empty serves the whole repository.
        instances: Instances per device, by model; the default is one.
        verbose: Log Triton's informational lines.
        exit_timeout_s: Seconds for requests in flight to finish when the server stops.
    """

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    gateway_port: int | None = None
    repository: Path = field(default_factory=lambda: default_repository())  # noqa: PLW0108  # defined below
    gpus: tuple[int, ...] | None = None
    models: tuple[str, ...] = ()
    instances: Mapping[str, int] = field(default_factory=dict)
    verbose: bool = False
    exit_timeout_s: int = 30

    @property
    def triton_ports(self) -> dict[str, int]:
        """Triton's HTTP, gRPC and metrics ports, by their options."""
        return {"--http-port": self.http_port, "--grpc-port": self.grpc_port, "--metrics-port": self.metrics_port}

    @property
    def ports(self) -> dict[str, int]:
        """All ports of the server, by their options."""
        return self.triton_ports | ({"--gateway-port": self.gateway_port} if self.gateway_port else {})

    @property
    def local_host(self) -> str:
        """Host part of a URL that reaches the server from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"[{host}]" if self.is_ipv6 else host

    @property
    def is_ipv6(self) -> bool:
        """True if the host is a literal IPv6 address."""
        return ":" in self.host

    @property
    def addresses(self) -> dict[str, str]:
        """Addresses for callers, by endpoint."""
        host = self.local_host
        return {
            "http": f"http://{host}:{self.http_port}",
            "grpc": f"{host}:{self.grpc_port}",
            "metrics": f"http://{host}:{self.metrics_port}/metrics",
            **({"gateway": f"http://{host}:{self.gateway_port}"} if self.gateway_port else {}),
        }


def default_repository() -> Path:
    """Return ``model_repository/`` of the working folder, else of the installed package, else of the checkout."""
    package = Path(__file__).resolve().parents[1]
    candidates = [Path("model_repository"), package / "model_repository", package.parents[1] / "model_repository"]
    return next((path for path in candidates if path.is_dir()), candidates[0]).absolute()


def cache_folder() -> Path:
    """Return the folder for fetched binaries: GENSERVE_CACHE_DIR, else XDG's cache folder."""
    return _folder("GENSERVE_CACHE_DIR", "XDG_CACHE_HOME", ".cache")


def state_folder(http_port: int) -> Path:
    """Return the folder for a server's process id, log and rendered repository.

    It is below GENSERVE_STATE_DIR, else below XDG's state folder.
    """
    return _folder("GENSERVE_STATE_DIR", "XDG_STATE_HOME", ".local/state") / f"server-{http_port}"


def _folder(own: str, xdg: str, below_home: str) -> Path:
    if os.environ.get(own):
        return Path(os.environ[own])
    base = Path(os.environ[xdg]) if os.environ.get(xdg) else Path.home() / below_home
    return base / "genserve"


def make_folder(path: Path, *, setting: str) -> Path:
    """Create a folder that only this user can access, and check that it is writable.

    Args:
        path: The folder.
        setting: Environment variable that moves the folder, for the error message.

    Raises:
        ServeError: The folder cannot be created or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ServeError(f"cannot create {path}: {error.strerror} (set {setting} to a folder you can write)") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise ServeError(f"cannot write to {path} (set {setting} to a folder you can write)")
    return path
