"""Link to one worker process: start, messages in both directions, end."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO

from genserve_backend.worker.messages import Cancel, Event, Start, Submit
from genserve_backend.worker.threads import start_thread

WORKER_PATH_ENV = "GENSERVE_WORKER_PYTHONPATH"
"""Import path of workers, if it differs from that of Triton's stub."""

SPIN_COUNT = "1000"
"""Spins of torch's CPU threads (GNU OpenMP) on a lock before they sleep.

Two workers that spin on the same cores block each other. The demo's FLUX, 20 steps at 128 pixels on two cores, with
OpenMP's default and with this value: 0.28 s and 0.29 s alone, 1.2 to 1.7 s and 0.56 s alongside another worker.
"""

KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20)}
"""glibc malloc settings that keep freed memory for the next forward instead of returning it to the system.

Otherwise each tensor of some megabytes gets new pages, which the system clears: a quarter of the time of the demo's
FLUX with a batch of 8. 32 MiB is the maximum that glibc accepts.
"""

ALLOCATOR_ENVS = frozenset({"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"})
"""Current and older name of the setting of torch's allocators."""
GPU_ALLOCATOR = "expandable_segments:True"
"""Allocator setting that prevents fragmentation of GPU memory by batches of changing sizes."""

logger = logging.getLogger(__name__)


class WorkerGone(Exception):
    """The worker has died, or closed its end of the socket."""


class WorkerLink:
    """A running worker process and the socket to it.

    One thread writes and one reads, so neither `send` nor `receive` blocks on a worker that stops in the middle of a
    message.

    Args:
        start: First message to the worker.
        log: File for the worker's output; None inherits this process's.
    """

    def __init__(self, start: Start, *, log: IO[bytes] | None = None) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            # Spawned, never forked: a fork would inherit Triton's threads and locks, and CUDA forbids it.
            self._process = subprocess.Popen(
                [python_executable(), "-m", "genserve_backend.worker.process", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=worker_environment(),
            )
        self._connection = Connection(os.dup(self._socket.fileno()))
        self._outbox: SimpleQueue[Start | Submit | Cancel | None] = SimpleQueue()
        self._inbox: SimpleQueue[Event | None] = SimpleQueue()
        self._threads = [
            start_thread(self._write, name="worker-writer"),
            start_thread(self._read, name="worker-reader"),
        ]
        self.send(start)

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    def send(self, message: Start | Submit | Cancel) -> None:
        """Queue a message. If the worker dies before it arrives, `receive` raises."""
        self._outbox.put(message)

    def receive(self, timeout: float) -> Event | None:
        """Return the worker's next event, or None if there is none within `timeout` seconds.

        Raises:
            WorkerGone: There will be no more events.
        """
        try:
            event = self._inbox.get(timeout=timeout)
        except Empty:
            return None
        if event is None:
            self._inbox.put(None)  # for the next call
            raise WorkerGone
        return event

    @property
    def is_stopped(self) -> bool:
        """True while the worker is stopped by a signal."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii", errors="replace")
        except OSError:
            return False
        return state.rpartition(")")[2].split()[0] == "T"  # proc(5)

    def end(self) -> str:
        """Kill the worker if it still runs, and return the reason of its end."""
        self._process.kill()
        code = self._process.wait()
        self._outbox.put(None)
        # Shutdown, not only close: a child of the worker may hold the other end open.
        self._socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._connection.close()
        self._socket.close()
        return exit_reason(code)

    def _read(self) -> None:
        try:
            while True:
                self._inbox.put(self._connection.recv())
        except (EOFError, OSError):
            pass
        except Exception:
            logger.exception("invalid message from the worker", extra={"fields": {"worker": self.pid}})
        finally:
            self._inbox.put(None)

    def _write(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self._connection.send(message)
            except OSError:
                return


def exit_reason(code: int) -> str:
    """Return a description of the end of a process, from subprocess's return code."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:  # real-time signals between the first and the last have no names
        return f"signal {-code}"


def python_executable() -> str:
    """Return the interpreter for the worker: the running one. Inside Triton's stub it is found on PATH.

    Raises:
        FileNotFoundError: There is no interpreter.
    """
    versioned = f"python{sys.version_info.major}.{sys.version_info.minor}"
    candidates = [sys.executable, shutil.which(versioned), shutil.which("python3")]
    found = next((path for path in candidates if path and Path(path).name.startswith("python")), None)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, f"no {versioned} on PATH")
    return found


def worker_environment() -> dict[str, str]:
    """Return this process's environment with an explicit import path: an embedded interpreter may have its own.

    The current folder stays off that path. Model hubs are offline: a checkpoint is a local folder.
    """
    path = os.environ.get(WORKER_PATH_ENV) or os.pathsep.join(entry for entry in sys.path if entry)
    threads = {} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": SPIN_COUNT}
    allocator = {} if ALLOCATOR_ENVS & os.environ.keys() else {min(ALLOCATOR_ENVS): GPU_ALLOCATOR}
    quiet = {"TRANSFORMERS_VERBOSITY": "error"}  # avoids warnings about unused image processors
    return {
        **quiet,
        **threads,
        **allocator,
        **KEEP_MEMORY,
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",
    }
