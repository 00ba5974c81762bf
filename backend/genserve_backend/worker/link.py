"""One worker process as its instance sees it: started, spoken to, heard, ended."""

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

from genserve_backend.worker.messages import Cancel, Event, Start, Submit
from genserve_backend.worker.threads import start_thread

WORKER_PATH_ENV = "GENSERVE_WORKER_PYTHONPATH"
"""Where workers import from, where that is not what Triton's stub imports from."""

SPIN_COUNT = "1000"
"""How long torch's CPU threads (GNU OpenMP) wait for each other by spinning before they sleep.

Two workers that spin on the same cores keep each other from the work they wait for. The demo's FLUX, 20 steps at 128
pixels on two cores, OpenMP's default against this: 0.28 s and 0.29 s alone, 1.2 to 1.7 s and 0.56 s beside another.
"""

KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20)}
"""Has glibc's malloc keep what a forward frees for the next one, instead of giving it back to the system.

Each tensor of some megabytes would otherwise be new pages, which the system clears: a quarter of the time of the
demo's FLUX, batch of 8. 32 MiB is the most that glibc takes.
"""


ALLOCATOR_ENVS = frozenset({"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"})
"""The setting of torch's allocators, by its name and by the older one."""
GPU_ALLOCATOR = "expandable_segments:True"
"""Keeps batches of ever other sizes from leaving a GPU's memory in pieces that fit none of them."""

logger = logging.getLogger(__name__)


class WorkerGone(Exception):
    """The worker has died, or closed its end."""


class WorkerLink:
    """A running worker process and the socket to it.

    One thread writes and one reads, so neither `send` nor `receive` waits for a worker that stops in the middle of a
    message.
    """

    def __init__(self, start: Start) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            # Spawned, never forked: a fork would inherit Triton's threads and locks, and CUDA forbids it.
            self._process = subprocess.Popen(
                [python_executable(), "-m", "genserve_backend.worker.process", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
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
        """Queue a message. If the worker dies before it arrives, `receive` is what tells."""
        self._outbox.put(message)

    def receive(self, timeout: float) -> Event | None:
        """The worker's next event, or None when there is none within `timeout` seconds.

        Raises:
            WorkerGone: There will never be another one.
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
        """Whether the worker has been stopped by a signal."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii", errors="replace")
        except OSError:
            return False
        return state.rpartition(")")[2].split()[0] == "T"  # proc(5)

    def end(self) -> str:
        """Kill the worker if it still runs, and return how it ended."""
        self._process.kill()
        code = self._process.wait()
        self._outbox.put(None)
        # Not merely closed: a child of the worker may hold the other end open.
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
            logger.exception("message from the worker not understood", extra={"fields": {"worker": self.pid}})
        finally:
            self._inbox.put(None)

    def _write(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self._connection.send(message)
            except OSError:
                return


def exit_reason(code: int) -> str:
    """Return how a process ended, from subprocess's return code."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:  # the real-time signals between the first and the last have no names
        return f"signal {-code}"


def python_executable() -> str:
    """Return the interpreter for the worker: the running one, which inside Triton's stub is found by PATH.

    Raises:
        FileNotFoundError: There is none.
    """
    versioned = f"python{sys.version_info.major}.{sys.version_info.minor}"
    candidates = [sys.executable, shutil.which(versioned), shutil.which("python3")]
    found = next((path for path in candidates if path and Path(path).name.startswith("python")), None)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, f"no {versioned} on PATH")
    return found


def worker_environment() -> dict[str, str]:
    """This process's environment, with the import path made explicit: an embedded interpreter may have its own.

    The current folder stays off that path, and no model hub is ever asked: a checkpoint is a local folder.
    """
    path = os.environ.get(WORKER_PATH_ENV) or os.pathsep.join(entry for entry in sys.path if entry)
    threads = {} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": SPIN_COUNT}
    allocator = {} if ALLOCATOR_ENVS & os.environ.keys() else {min(ALLOCATOR_ENVS): GPU_ALLOCATOR}
    quiet = {"TRANSFORMERS_VERBOSITY": "error"}  # or each start warns of image processors that are not used
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
