"""The worker process: ``python -m genserve_backend.worker.process FD PARENT_PID``.

It owns one device and one loaded model. It ends when its instance ends, for whatever reason.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from genserve_backend import logs
from genserve_backend.checkpoints import CheckpointError
from genserve_backend.settings import ModelSettings, SettingsError
from genserve_backend.worker.engine import Emit, Engine
from genserve_backend.worker.messages import Cancel, Event, NotReady, Ready, Start, Submit
from genserve_backend.worker.threads import exit_on_failure, start_thread

PR_SET_PDEATHSIG = 1  # prctl(2)
VISIBLE_GPUS_ENV = "CUDA_VISIBLE_DEVICES"

logger = logging.getLogger(__name__)


def die_with_parent(parent_pid: int) -> None:
    """Let the kernel kill this process when the thread that started it ends.

    This works even for a stopped process, which does not notice the end of the socket.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(0)


def hide_other_gpus(start: Start) -> str:
    """Hide the GPUs of other workers, and return the name of this worker's device among the visible ones.

    No thread or library can then use another worker's GPU by mistake. CUDA reads the variable once, at its start.
    """
    gpus = start.settings.gpus(start.device)
    if not gpus:
        return start.device
    visible = [name for name in os.environ.get(VISIBLE_GPUS_ENV, "").split(",") if name]
    if visible and max(gpus) >= len(visible):
        raise SettingsError(f"no GPU {max(gpus)} in {VISIBLE_GPUS_ENV}={os.environ[VISIBLE_GPUS_ENV]}")
    os.environ[VISIBLE_GPUS_ENV] = ",".join(visible[gpu] if visible else str(gpu) for gpu in gpus)
    return "cuda:0"


def load_engine(start: Start, emit: Emit) -> Engine:
    """Import torch, set up the process for its device, and load the model."""
    device = hide_other_gpus(start)
    import torch  # here: an invalid start message is reported at once

    if start.settings.threads:
        torch.set_num_threads(start.settings.threads)
    if device.startswith("cuda") and start.settings.memory_share:
        torch.cuda.set_per_process_memory_fraction(start.settings.memory_share, device)
    module, _, factory = start.engine.partition(":")
    build: Callable[[ModelSettings, str, Emit], Engine] = getattr(importlib.import_module(module), factory)
    return build(start.settings, device, emit)


def main(fd: int, parent_pid: int) -> None:
    """Load the model, report that it is ready, and work."""
    die_with_parent(parent_pid)
    # Ctrl-C reaches the whole process group, but the instance decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.configure()
    connection = Connection(fd)
    start = connection.recv()
    emit_lock = threading.Lock()

    def emit(event: Event) -> None:
        with emit_lock:
            connection.send(event)

    try:
        engine = load_engine(start, emit)
    except CheckpointError as error:
        emit(NotReady(str(error)))
        raise SystemExit(1) from None
    except Exception as error:
        logger.exception("model failed to load", extra={"fields": {"instance": start.instance}})
        reason = str(error).strip().partition("\n")[0]
        emit(NotReady(f"{type(error).__name__}: {reason}"))
        raise SystemExit(1) from None

    def listen() -> None:
        try:
            while True:
                message = connection.recv()
                if isinstance(message, Submit):
                    engine.submit(message)
                elif isinstance(message, Cancel):
                    engine.cancel(message.job_id)
        except (EOFError, OSError):
            os._exit(0)  # the instance is gone: nobody is left to answer

    start_thread(listen, name="listen")
    emit(Ready())
    exit_on_failure(engine.run)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
