"""Threads of stubs and workers that fail on demand, for a test's model.py files and their workers.

The file that the environment names arms a failure. The first thread with the name in it that reaches its next piece of
work removes the file and raises a BaseException.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from genserve_backend.worker.link import WORKER_PATH_ENV

ARMED_ENV = "FAILING_THREADS_ARMED"
"""Path of the file with the name of the thread to fail."""


class Panic(BaseException):
    """A BaseException outside Exception, like pyo3's PanicException."""


def prepare_stub() -> None:
    """Make the stub's threads fail on demand, and let its worker import this module."""
    from genserve_backend.worker.supervisor import Supervisor

    os.environ[WORKER_PATH_ENV] = os.pathsep.join([str(Path(__file__).parent), os.environ[WORKER_PATH_ENV]])
    _fail_on_demand(Supervisor, "_check_callers", thread="supervisor")
    _fail_on_demand(Connection, "send", thread="worker-writer")
    _fail_on_demand(Connection, "recv", thread="worker-reader")


def build_flux(*arguments: Any) -> Any:
    """Build the flux engine with threads that fail on demand."""
    from genserve_backend.flux.build import build
    from genserve_backend.flux.decode import Decoder
    from genserve_backend.flux.engine import FluxEngine

    _fail_on_demand(FluxEngine, "turn", thread="MainThread")
    _fail_on_demand(Decoder, "_decode", thread="decode")
    _fail_on_demand(Decoder, "_write", thread="write")
    return _listening(build(*arguments))


def build_rerank(*arguments: Any) -> Any:
    """Build the rerank engine with threads that fail on demand."""
    from genserve_backend.rerank.build import build
    from genserve_backend.rerank.tokenization import Tokenization

    _fail_on_demand(Tokenization, "_tokenize", thread="tokenize")
    return _listening(build(*arguments))


def _listening(engine: Any) -> Any:
    _fail_on_demand(type(engine), "submit", thread="listen")
    return engine


def _fail_on_demand(owner: Any, name: str, *, thread: str) -> None:
    original: Callable[..., Any] = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        if threading.current_thread().name.partition("-0")[0].partition("-1")[0] == thread and _disarm(thread):
            raise Panic(f"{thread} fails as the test wants it")
        return original(*arguments, **options)

    setattr(owner, name, call)


def _disarm(thread: str) -> bool:
    armed = Path(os.environ[ARMED_ENV])
    try:
        if armed.read_text() != thread:
            return False
        armed.unlink()
    except FileNotFoundError:
        return False
    return True
