"""State of local servers: one folder per HTTP port, with the server's process id and log."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from genserve.serve.options import ServeError, ServeOptions, make_folder, state_folder


@dataclass(frozen=True)
class ServerState:
    """State folder of the server on one HTTP port."""

    http_port: int
    folder: Path

    @classmethod
    def of(cls, http_port: int) -> ServerState:
        """Return the state of the server on that port, running or not."""
        return cls(http_port, state_folder(http_port))

    @property
    def log(self) -> Path:
        """Log file of a detached server."""
        return self.folder / "server.log"

    @property
    def repository(self) -> Path:
        """Folder of the rendered model repository."""
        return self.folder / "repository"

    @property
    def board(self) -> Path:
        """File of the task board."""
        return self.folder / "board"

    @property
    def _file(self) -> Path:
        return self.folder / "server.json"

    def create(self) -> None:
        """Create the folder.

        Raises:
            ServeError: The folder is not writable.
        """
        make_folder(self.folder, setting="GENSERVE_STATE_DIR")

    def write(self, options: ServeOptions, *, ready: bool, error: str | None = None) -> None:
        """Record this process as the server."""
        me = psutil.Process()
        record = {"pid": me.pid, "started": me.create_time(), "ready": ready, "error": error, **options.addresses}
        temporary = self._file.with_suffix(".new")
        temporary.write_text(json.dumps(record))
        temporary.replace(self._file)

    def read(self) -> dict[str, Any] | None:
        """Return the last record, None without a valid one."""
        try:
            record = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) else None

    def process(self) -> psutil.Process | None:
        """Return the running server's process, or None. A reused process id does not count."""
        record = self.read() or {}
        try:
            process = psutil.Process(record["pid"])
            return process if abs(process.create_time() - record["started"]) < 1.0 else None
        except (KeyError, psutil.Error):
            return None

    def remove(self) -> None:
        """Remove the record. The log stays."""
        self._file.unlink(missing_ok=True)


def stop_server(http_port: int, *, timeout_s: float = 60.0) -> bool:
    """Stop the server on that port in order. Return False if none runs.

    Raises:
        ServeError: The server has not ended within `timeout_s`.
    """
    state = ServerState.of(http_port)
    process = state.process()
    if process is None:
        state.remove()
        return False
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout_s)
    except psutil.TimeoutExpired:
        raise ServeError(f"the server (process {process.pid}) has not ended within {timeout_s:g} s") from None
    return True
