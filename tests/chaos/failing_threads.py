"""Threads of stubs and workers that fail on demand; model.py files of a test's repository and their workers import it.

A failure is armed by creating the file that the environment names; the first thread of the chosen name to get to its
next piece of work removes the file and raises what is no Exception.
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
"""A file that holds the name of the thread to fail."""


class Panic(BaseException):
    """Like pyo3's PanicException, no Exception."""


def prepare_stub() -> None:
    """Let the stub's threads fail, and its worker import this module."""
    from genserve_backend.worker.supervisor import Supervisor

    os.environ[WORKER_PATH_ENV] = os.pathsep.join([str(Path(__file__).parent), os.environ[WORKER_PATH_ENV]])
    _let_fail(Supervisor, "_look_after_callers", thread="supervisor")
    _let_fail(Connection, "send", thread="worker-writer")
    _let_fail(Connection, "recv", thread="worker-reader")


def build_flux(*arguments: Any) -> Any:
    """The flux engine with threads that may fail."""
    from genserve_backend.flux.decode import Decoder
    from genserve_backend.flux.engine import FluxEngine
    from genserve_backend.flux.load import build

    _let_fail(FluxEngine, "turn", thread="MainThread")
    _let_fail(Decoder, "_decode", thread="decode")
    _let_fail(Decoder, "_write", thread="write")
    return _listening(build(*arguments))


def build_rerank(*arguments: Any) -> Any:
    """The rerank engine with threads that may fail."""
    from genserve_backend.rerank.load import build
    from genserve_backend.rerank.reader import Reader

    _let_fail(Reader, "_read", thread="read")
    return _listening(build(*arguments))


def _listening(engine: Any) -> Any:
    _let_fail(type(engine), "submit", thread="listen")
    return engine


def _let_fail(owner: Any, name: str, *, thread: str) -> None:
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
