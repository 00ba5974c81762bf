"""What `genserve serve` was asked for, as one typed object."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


class ServeError(Exception):
    """The server cannot be started, stopped or found; one line says why."""


@dataclass(frozen=True)
class ServeOptions:
    """One server.

    Attributes:
        host: Address that all three endpoints bind to.
        gpus: GPU ids for every model, or None for what Triton finds.
        models: Names of the models to serve, or empty for all in the repository.
        instances: Instances of a model on each device, where not one.
        verbose: Whether Triton's own informational log lines are shown.
        exit_timeout_s: Seconds that requests in flight get to finish when the server stops.
    """

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    repository: Path = field(default_factory=lambda: default_repository())  # noqa: PLW0108  # defined below
    gpus: tuple[int, ...] | None = None
    models: tuple[str, ...] = ()
    instances: Mapping[str, int] = field(default_factory=dict)
    verbose: bool = False
    exit_timeout_s: int = 30

    @property
    def ports(self) -> tuple[int, int, int]:
        """HTTP, gRPC and metrics."""
        return self.http_port, self.grpc_port, self.metrics_port

    @property
    def local_host(self) -> str:
        """An address that reaches the server from this machine, as it stands in a URL."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"[{host}]" if self.is_ipv6 else host

    @property
    def is_ipv6(self) -> bool:
        """Whether the host is a literal IPv6 address."""
        return ":" in self.host

    @property
    def addresses(self) -> dict[str, str]:
        """The three addresses that callers use."""
        host = self.local_host
        return {
            "http": f"http://{host}:{self.http_port}",
            "grpc": f"{host}:{self.grpc_port}",
            "metrics": f"http://{host}:{self.metrics_port}/metrics",
        }


def default_repository() -> Path:
    """``model_repository/`` here, else the one that was installed with the package, else the checkout's."""
    package = Path(__file__).resolve().parents[1]
    candidates = [Path("model_repository"), package / "model_repository", package.parents[1] / "model_repository"]
    return next((path for path in candidates if path.is_dir()), candidates[0]).absolute()


def cache_folder() -> Path:
    """Where fetched binaries are kept, for all servers of this user: GENSERVE_CACHE_DIR, else XDG's cache folder."""
    return _folder("GENSERVE_CACHE_DIR", "XDG_CACHE_HOME", ".cache")


def state_folder(http_port: int) -> Path:
    """Where a server on that port keeps its process id, log and rendered repository.

    Below GENSERVE_STATE_DIR, else below XDG's state folder.
    """
    return _folder("GENSERVE_STATE_DIR", "XDG_STATE_HOME", ".local/state") / f"server-{http_port}"


def _folder(own: str, xdg: str, below_home: str) -> Path:
    if os.environ.get(own):
        return Path(os.environ[own])
    base = Path(os.environ[xdg]) if os.environ.get(xdg) else Path.home() / below_home
    return base / "genserve"


def make_folder(path: Path, *, setting: str) -> Path:
    """Create a folder for this user alone, and check that it can be written.

    Raises:
        ServeError: It cannot; `setting` names the environment variable that moves it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ServeError(f"cannot create {path}: {error.strerror} (set {setting} to a folder you can write)") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise ServeError(f"cannot write to {path} (set {setting} to a folder you can write)")
    return path
