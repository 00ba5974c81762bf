"""Servers with simulated devices on this machine, and faults for each of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from genserve.serve.options import ServeError
from genserve.serve.ports import free_ports
from genserve.serve.process import clear_abandoned_segments
from genserve.serve.state import ServerState
from simulated import DEVICE_ENV
from simulated.repository import SimulatedRepository, link_checkpoint, render

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
POLL_S = 0.1
PROTOCOLS = ("grpc", "http")


@dataclass
class SimulatedServer:
    """One `genserve serve` with its own ports, state folder and checkpoint name.

    Attributes:
        name: The model's name in INFO, by which an answer names its server.
        device: The device from the next start on, as `simulated.device.Device.load` takes it.
        folder: Folder for state, checkpoint and log.
        repository: Repository to serve.
        environment: Settings of the models.
    """

    name: str
    device: str
    folder: Path
    repository: SimulatedRepository
    environment: Mapping[str, str] = field(default_factory=dict)
    _ports: list[int] = field(default_factory=lambda: free_ports(3))
    _serve: subprocess.Popen[bytes] | None = None
    _stopped: psutil.Process | None = None

    def url(self, protocol: str) -> str:
        """Return the address for ``grpc`` or ``http``."""
        http, grpc, _ = self._ports
        return f"http://127.0.0.1:{http}" if protocol == "http" else f"127.0.0.1:{grpc}"

    @property
    def log(self) -> Path:
        """Log of all starts."""
        return self.folder / "server.log"

    def start(self) -> None:
        """Start the server without waiting for it."""
        http, grpc, metrics = map(str, self._ports)
        command = [sys.executable, "-m", "genserve", "serve", "--model", "flux", "--model", "tasks"]
        command += ["--repository", str(self.repository.models)]
        command += ["--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics]
        checkpoint = self.folder / self.name
        if not checkpoint.exists():
            link_checkpoint(self.folder, self.name)
        path = os.pathsep.join(filter(None, [str(self.repository.packages), os.environ.get("PYTHONPATH")]))
        environment = {
            "PYTHONPATH": path,
            "FLUX_MODEL_PATH": str(checkpoint),
            "GENSERVE_STATE_DIR": str(self.folder),
            "OMP_NUM_THREADS": "1",  # the device computes nothing
            DEVICE_ENV: self.device,
        }
        with self.log.open("ab") as log:
            self._serve = subprocess.Popen(
                command,
                env={**os.environ, **environment, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this process, which then stops the server
            )

    def wait_ready(self) -> None:
        """Wait until all models are ready.

        Raises:
            ServeError: The server ended, or was not ready in time.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (self._state.read() or {}).get("ready"):
            if self._serve is None or self._serve.poll() is not None or time.monotonic() > deadline:
                last = self.log.read_text(errors="replace").strip().rpartition("\n")[2]
                raise ServeError(f"{self.name} did not start: {last}")
            time.sleep(POLL_S)

    def suspend(self) -> None:
        """Stop tritonserver with SIGSTOP: connections stay open, and nothing is answered."""
        (triton,) = [child for child in self._root.children() if child.name() == "tritonserver"]
        triton.suspend()
        self._stopped = triton

    def resume(self) -> None:
        """Continue after `suspend`."""
        if self._stopped:
            self._stopped.resume()
            self._stopped = None

    def kill(self) -> None:
        """Kill all processes of the server with SIGKILL."""
        if not self.is_running:
            return
        serve = self._root
        serve.suspend()  # it would restart what dies first
        family = [serve, *serve.children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
        self._serve, self._stopped = None, None
        self._state.remove()

    def terminate(self) -> None:
        """Ask the server to stop after its requests in flight have finished, without waiting."""
        if self.is_running:
            self._root.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """Stop the server in order, or kill it if it does not end."""
        if self._stopped is None and self._serve is not None:
            self.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._serve.wait(STOP_TIMEOUT_S)
        self.kill()

    def restart(self) -> None:
        """Stop the server in order and start it again, on the same ports; return when it is ready.

        Raises:
            ServeError: It did not become ready.
        """
        self.stop()
        self.start()
        self.wait_ready()

    def repair(self) -> None:
        """Return with a server that is ready, whatever has happened to it.

        Raises:
            ServeError: It did not become ready.
        """
        self.resume()
        if not self.is_running:
            self.start()
        self.wait_ready()

    @property
    def is_running(self) -> bool:
        """True while the `genserve serve` process exists."""
        return self._serve is not None and self._serve.poll() is None

    @property
    def _root(self) -> psutil.Process:
        if self._serve is None:
            raise ServeError(f"{self.name} is not running")
        return psutil.Process(self._serve.pid)

    @property
    def _state(self) -> ServerState:
        return ServerState(self._ports[0], self.folder / f"server-{self._ports[0]}")


@contextlib.contextmanager
def fleet(
    devices: Sequence[str | float], *, instances: int = 1, environment: Mapping[str, str] | None = None
) -> Iterator[list[SimulatedServer]]:
    """Serve one server per entry of `devices` inside the block, whatever has happened to them at its end.

    Args:
        devices: The device of each server, as `simulated.device.Device.load` takes it; a number is seconds per row.
        instances: Instances of each server, with a device each.
        environment: Settings of the models.

    Raises:
        ServeError: A server did not become ready.
    """
    with tempfile.TemporaryDirectory(prefix="genserve-fleet-") as temporary:
        folder = Path(temporary)
        repository = render(folder)
        servers = []
        for number, device in enumerate(devices):
            own = folder / f"server-{number}"
            own.mkdir()
            settings = {"FLUX_WORKERS": str(instances), **(environment or {})}
            servers.append(SimulatedServer(f"simulated-{number}", str(device), own, repository, settings))
        try:
            for server in servers:
                server.start()
            for server in servers:
                server.wait_ready()
            yield servers
        finally:
            for server in servers:
                server.terminate()
            for server in servers:
                server.stop()
            clear_abandoned_segments()
