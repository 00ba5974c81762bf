"""One running tritonserver: started, waited for, watched, ended with all that belongs to it."""

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
MODEL_PATH_ENVS = ("FLUX_MODEL_PATH", "RERANK_MODEL_PATH")
POLL_S = 0.2
INDEX_TIMEOUT_S = 5.0
PROBE_TIMEOUT_S = 1.0
"""Of the health endpoint; the end of the server waits for a probe under way."""
_LIBC = ctypes.CDLL(None, use_errno=True)


class TritonProcess:
    """A tritonserver, its stubs and their workers.

    Args:
        triton: What to start.
        options: Addresses and limits.
        repository: The rendered model repository.
        board: Path of the board that its models share.
        log: Where its output goes, or None for this process's own.
    """

    def __init__(
        self, triton: Triton, options: ServeOptions, *, repository: Path, board: Path, log: IO[bytes] | None = None
    ) -> None:
        clear_abandoned_segments()
        check_ports(options)
        self._options = options
        self._shm_prefix = f"{SHM_PREFIX}-{os.getpid()}-{uuid.uuid4().hex[:8]}-"
        self._process = subprocess.Popen(
            triton.command(options, repository=repository, shm_prefix=self._shm_prefix),
            cwd=triton.folder,
            env={**os.environ, **_absolute_paths(), **triton.environment, BOARD_ENV: str(board.absolute())},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for us: we end it in order
            preexec_fn=_end_with_parent,  # noqa: PLW1509  # safe: this process has one thread
        )
        self._stubs: list[psutil.Process] = []
        self._was_ready = False

    @property
    def pid(self) -> int:
        """The process id of tritonserver."""
        return self._process.pid

    @property
    def stubs(self) -> list[int]:
        """Process ids of the Python backend's stubs, as they were when the server got ready."""
        return [stub.pid for stub in self._stubs]

    def poll_ready(self) -> bool:
        """Whether every model is ready to serve.

        Raises:
            ServeError: One of them never will be, or the server has ended.
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
        """Triton's list of models with their states; empty while it does not listen, as it loads its models first."""
        try:
            answer = self._ask("POST", "/v2/repository/index", timeout_s=INDEX_TIMEOUT_S)
            return list(answer.json()) if answer.status == HTTPStatus.OK else []
        except (urllib3.exceptions.HTTPError, ValueError):
            return []

    def _ask(self, method: str, path: str, *, timeout_s: float) -> urllib3.BaseHTTPResponse:
        # Closed at once: Triton waits for open connections when it is told to stop.
        with urllib3.PoolManager(retries=False, timeout=timeout_s) as http:
            return http.request(method, self._options.addresses["http"] + path)

    def what_died(self) -> str | None:
        """Names the first part of the server that is gone, or None while all is well."""
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
        """Name what runs but does not move: stopped processes, and a server that was ready and no longer answers."""
        parts = [f"stub {stub.pid}" for stub in self._stubs if _is_stopped(stub.pid)]
        if _is_stopped(self.pid) or not self._is_live():
            parts.append("tritonserver")
        return parts

    def _is_live(self) -> bool:
        if not self._was_ready:
            return True  # it listens when it has loaded its models
        try:
            return self._ask("GET", "/v2/health/live", timeout_s=PROBE_TIMEOUT_S).status == HTTPStatus.OK
        except urllib3.exceptions.HTTPError:
            return False

    def stop(self, drain_s: float) -> None:
        """Let requests in flight finish for at most `drain_s`, then end every process and remove every segment."""
        family = self._family()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(drain_s)
        except subprocess.TimeoutExpired:
            family |= self._family()
            self._process.kill()
            self._process.wait()
        # Stubs follow their server and workers follow their stub, by themselves; one that is stuck on a lock which its
        # server held when it was killed does not, and is killed too.
        _, alive = psutil.wait_procs(family, timeout=3.0)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=3.0)
        for segment in SHM_FOLDER.glob(f"{self._shm_prefix}*"):
            segment.unlink(missing_ok=True)

    def _family(self) -> set[psutil.Process]:
        """All processes below tritonserver; of one that has died, its last known stubs and what is below them."""
        family = set(self._stubs)
        for pid in (self.pid, *self.stubs):
            with contextlib.suppress(psutil.NoSuchProcess):
                family.update(psutil.Process(pid).children(recursive=True))
        return family


def _is_stopped(pid: int) -> bool:
    """Whether a process has been stopped by a signal."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


def _end_with_parent() -> None:
    """Run in the child: end in order when this process dies, in whatever way."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _absolute_paths() -> dict[str, str]:
    """The checkpoints that the environment names, for a process that starts in another folder."""
    return {name: str(Path(os.environ[name]).absolute()) for name in MODEL_PATH_ENVS if os.environ.get(name)}


def _one_line(reason: str) -> str:
    """Triton's reason for a model that failed: the innermost message, without its layers' names and the traceback."""
    line = " ".join(reason.partition("\n\nAt:\n")[0].split())
    return line.rpartition("TritonModelException: ")[2]


def clear_abandoned_segments() -> None:
    """Remove shared memory of servers whose `genserve serve` was killed before it could do so itself."""
    for segment in SHM_FOLDER.glob(f"{SHM_PREFIX}-*"):
        owner = segment.name.split("-")[1]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            with contextlib.suppress(PermissionError):  # another user's
                segment.unlink(missing_ok=True)
