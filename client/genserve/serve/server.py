"""`genserve serve`: starts tritonserver, keeps it running, ends it in order."""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from types import FrameType

from genserve.serve.options import ServeError, ServeOptions
from genserve.serve.process import POLL_S, TritonProcess, check_ports
from genserve.serve.repository import render
from genserve.serve.state import ServerState
from genserve.serve.triton import Triton, find_triton
from genserve_backend import logs
from genserve_backend.logs import log

START_TIMEOUT_S = 1_800.0
"""A full-size FLUX takes minutes to read from a slow disk."""
STUB_LOSS_DRAIN_S = 5.0
"""Seconds that other instances' requests get to finish before the server restarts; those of the dead one never will."""
MAX_RESTARTS, RESTART_WINDOW_S = 5, 120.0
"""So many restarts within that time mean that restarting does not help."""

logger = logging.getLogger("genserve.serve")


class Server:
    """A tritonserver that is replaced when it, or one of its stubs, dies.

    Triton itself goes on saying that it is ready when a stub is dead, and never answers what that stub was given.

    Args:
        options: What to serve, and where.
        on_ready: Called each time the server gets ready.
    """

    def __init__(self, options: ServeOptions, *, on_ready: Callable[[], None] = lambda: None) -> None:
        self._options = options
        self._on_ready = on_ready
        self._state = ServerState.of(options.http_port)
        self._stopping = threading.Event()
        self._process: TritonProcess | None = None

    def run(self) -> None:
        """Serve until SIGTERM or Ctrl-C.

        Raises:
            ServeError: The server cannot be started, or keeps dying.
        """
        logs.configure()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        running = self._state.process()
        if running:
            raise ServeError(
                f"a server runs on HTTP port {self._options.http_port} already (process {running.pid});"
                f" genserve stop --http-port {self._options.http_port} ends it"
            )
        check_ports(self._options)
        self._state.create()
        self._state.write(self._options, ready=False)
        try:
            self._serve(find_triton())
        except ServeError as error:
            self._state.write(self._options, ready=False, error=str(error))
            raise
        else:
            self._state.remove()
        finally:
            self._clean()

    def _serve(self, triton: Triton) -> None:
        log(logger, logging.INFO, "starting", triton=triton.source, repository=self._options.repository)
        restarts: deque[float] = deque(maxlen=MAX_RESTARTS)
        while not self._stopping.is_set():
            self._clean()
            models = render(self._options, self._state.repository)
            process = TritonProcess(triton, self._options, repository=self._state.repository, board=self._state.board)
            self._process = process
            drain_s = float(self._options.exit_timeout_s)
            try:
                started = time.monotonic()
                self._wait_ready(process)
                if self._stopping.is_set():
                    break
                self._announce(models, seconds=time.monotonic() - started)
                cause = self._watch(process)
                if cause is None:
                    break
                log(logger, logging.ERROR, "restarting", cause=cause)
                self._state.write(self._options, ready=False)
                drain_s = STUB_LOSS_DRAIN_S
            finally:
                process.stop(drain_s)
            restarts.append(time.monotonic())
            if len(restarts) == MAX_RESTARTS and restarts[-1] - restarts[0] < RESTART_WINDOW_S:
                raise ServeError(f"{cause}, {MAX_RESTARTS} times within {RESTART_WINDOW_S:g} s: giving up")
        log(logger, logging.INFO, "stopped")

    def _wait_ready(self, process: TritonProcess) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._stopping.is_set() and not process.poll_ready():
            if time.monotonic() > deadline:
                raise ServeError(f"the server was not ready within {START_TIMEOUT_S:g} s; its log says why")
            self._stopping.wait(POLL_S)

    def _announce(self, models: list[str], *, seconds: float) -> None:
        self._state.write(self._options, ready=True)
        log(logger, logging.INFO, "ready", models=",".join(models), seconds=seconds)
        self._on_ready()

    def _watch(self, process: TritonProcess) -> str | None:
        """Wait until something dies, and name it; None when the server was told to stop."""
        while not self._stopping.wait(POLL_S):
            cause = process.what_died()
            if cause:
                return cause
        return None

    def _clean(self) -> None:
        shutil.rmtree(self._state.repository, ignore_errors=True)
        for board in self._state.folder.glob(f"{self._state.board.name}*"):
            board.unlink(missing_ok=True)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._stopping.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for requests in flight
        log(logger, logging.INFO, "stopping", signal=signal.Signals(number).name)
        self._stopping.set()


def start_detached(arguments: list[str], http_port: int) -> ServerState:
    """Start ``genserve serve ARGUMENTS`` in the background and wait until it is ready.

    Raises:
        ServeError: It did not get ready.
    """
    state = ServerState.of(http_port)
    state.create()
    state.remove()
    with state.log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "genserve", "serve", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    while process.poll() is None:
        record = state.read()
        if record and record["ready"]:
            return state
        time.sleep(POLL_S)
    last_line = state.log.read_text(errors="replace").strip().rpartition("\n")[2]
    raise ServeError((state.read() or {}).get("error") or f"{last_line.removeprefix('genserve: ')} (log: {state.log})")
