"""A tritonserver process with its stubs and workers: start, readiness, health and stop."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import uuid
from http import HTTPStatus
from pathlib import Path
from typing import IO

import psutil
import urllib3

from genserve.serve.options import ServeError, ServeOptions
from genserve.serve.ports import check_ports
from genserve.serve.triton import STUB, Triton
from genserve_backend.board import BOARD_ENV

PR_SET_PDEATHSIG = 1  # prctl(2)
SHM_FOLDER = Path("/dev/shm")  # noqa: S108  # this is where Triton's Python backend keeps its segments
SHM_PREFIX = "genserve"
MODEL_PATH_ENVS = ("FLUX_MODEL_PATH", "RERANK_MODEL_PATH", "LORA_PATH")
POLL_S = 0.2
INDEX_TIMEOUT_S = 5.0
PROBE_TIMEOUT_S = 1.0
"""Timeout of a health probe. Stopping the server waits for a running probe."""
_LIBC = ctypes.CDLL(None, use_errno=True)


class TritonProcess:
    """tritonserver with its stubs and their workers.

    Args:
        triton: The installation to start.
        options: Addresses and limits.
        repository: The rendered model repository.
        board: Path of the task board that the models share.
        log: File for the output; None inherits this process's.
    """

    def __init__(
        self, triton: Triton, options: ServeOptions, *, repository: Path, board: Path, log: IO[bytes] | None = None
    ) -> None:
        clear_abandoned_segments()
        check_ports(options, options.triton_ports)
        self._options = options
        self._shm_prefix = f"{SHM_PREFIX}-{os.getpid()}-{uuid.uuid4().hex[:8]}-"
        self._process = subprocess.Popen(
            triton.command(options, repository=repository, shm_prefix=self._shm_prefix),
            cwd=triton.folder,
            env={**os.environ, **_absolute_paths(), **triton.environment, BOARD_ENV: str(board.absolute())},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C must reach only this process, which stops the server in order
            preexec_fn=end_with_parent,  # noqa: PLW1509  # safe: this process has one thread
        )
        self._stubs: list[psutil.Process] = []
        self._was_ready = False

    @property
    def pid(self) -> int:
        """Process id of tritonserver."""
        return self._process.pid

    @property
    def stubs(self) -> list[int]:
        """Process ids of the Python backend's stubs when the server became ready."""
        return [stub.pid for stub in self._stubs]

    def poll_ready(self) -> bool:
        """Return whether every model is ready.

        Raises:
            ServeError: A model failed to load, or the server has ended.
        """
        if self._process.poll() is not None:
            raise ServeError(f"tritonserver ended with {self._process.returncode} while it started; its log says why")
        index = self._repository_index()
        for model in index:
            if model.get("state") == "UNAVAILABLE":
                raise ServeError(_one_line(model.get("reason", "")) or f"model {model['name']} failed to load")
        self._stubs = [child for child in psutil.Process(self.pid).children() if STUB.startswith(child.name())]
        self._was_ready = bool(index) and all(model.get("state") == "READY" for model in index)
        return self._was_ready

    def _repository_index(self) -> list[dict[str, str]]:
        """Return Triton's models with their states, empty before Triton listens. It loads the models first."""
        try:
            answer = self._ask("POST", "/v2/repository/index", timeout_s=INDEX_TIMEOUT_S)
            return list(answer.json()) if answer.status == HTTPStatus.OK else []
        except (urllib3.exceptions.HTTPError, ValueError):
            return []

    def _ask(self, method: str, path: str, *, timeout_s: float) -> urllib3.BaseHTTPResponse:
        # Close the connection at once: Triton waits for open ones when it stops.
        with urllib3.PoolManager(retries=False, timeout=timeout_s) as http:
            return http.request(method, self._options.addresses["http"] + path)

    def dead_part(self) -> str | None:
        """Return the name of the first dead process, None if all are alive."""
        if self._process.poll() is not None:
            return f"tritonserver ended with {self._process.returncode}"
        for stub in self._stubs:
            try:
                alive = stub.is_running() and stub.status() != psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                alive = False
            if not alive:
                return f"stub {stub.pid} died"
        return None

    def stopped_parts(self) -> list[str]:
        """Return the names of stopped processes, and of a ready server that no longer answers."""
        parts = [f"stub {stub.pid}" for stub in self._stubs if _is_stopped(stub.pid)]
        if _is_stopped(self.pid) or not self._is_live():
            parts.append("tritonserver")
        return parts

    def _is_live(self) -> bool:
        if not self._was_ready:
            return True  # Triton listens only after its models have loaded
        try:
            return self._ask("GET", "/v2/health/live", timeout_s=PROBE_TIMEOUT_S).status == HTTPStatus.OK
        except urllib3.exceptions.HTTPError:
            return False

    def stop(self, drain_s: float) -> None:
        """Drain requests for at most `drain_s` seconds, then end every process and remove its shared memory."""
        family = self._family()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(drain_s)
        except subprocess.TimeoutExpired:
            family |= self._family()
            self._process.kill()
            self._process.wait()
        # Stubs end with their server and workers with their stub. A stub that waits for a lock held by a killed server
        # does not, so it is killed.
        _, alive = psutil.wait_procs(family, timeout=3.0)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=3.0)
        for segment in SHM_FOLDER.glob(f"{self._shm_prefix}*"):
            segment.unlink(missing_ok=True)

    def _family(self) -> set[psutil.Process]:
        """Return all processes below tritonserver. If it has died, use the stubs recorded before."""
        family = set(self._stubs)
        for pid in (self.pid, *self.stubs):
            with contextlib.suppress(psutil.NoSuchProcess):
                family.update(psutil.Process(pid).children(recursive=True))
        return family


def _is_stopped(pid: int) -> bool:
    """Return whether a signal has stopped the process."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


def end_with_parent() -> None:
    """Make the child end in order when this process dies. Runs in the child."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _absolute_paths() -> dict[str, str]:
    """Return the environment's checkpoint paths as absolute paths; the server starts in another folder."""
    return {name: str(Path(os.environ[name]).absolute()) for name in MODEL_PATH_ENVS if os.environ.get(name)}


def _one_line(reason: str) -> str:
    """Return the innermost message of Triton's reason for a failed model, without the traceback."""
    line = " ".join(reason.partition("\n\nAt:\n")[0].split())
    return line.rpartition("TritonModelException: ")[2]


def clear_abandoned_segments() -> None:
    """Remove shared memory left by killed `genserve serve` processes."""
    for segment in SHM_FOLDER.glob(f"{SHM_PREFIX}-*"):
        owner = segment.name.split("-")[1]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            with contextlib.suppress(PermissionError):  # it belongs to another user
                segment.unlink(missing_ok=True)
