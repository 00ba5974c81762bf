"""`genserve serve`: start, restart and stop of tritonserver and its gateway."""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from genserve.serve.gateway import GatewayProcess
from genserve.serve.options import ServeError, ServeOptions
from genserve.serve.ports import check_ports
from genserve.serve.process import POLL_S, TritonProcess
from genserve.serve.repository import render
from genserve.serve.state import ServerState
from genserve.serve.triton import Triton, find_triton
from genserve.serve.watch import Watch
from genserve_backend import logs
from genserve_backend.logs import log

START_TIMEOUT_S = 1_800.0
"""A full-size FLUX takes minutes to load from a slow disk."""
LOSS_DRAIN_S = 5.0
"""Seconds for requests of the healthy instances to finish before a restart."""
MAX_FAILED_STARTS, FAILED_START_PAUSE_S = 5, 5.0
"""Limit of consecutive failed restarts, and the pause between them."""
SAME_CTRL_C_S = 1.0
"""A wrapper may forward the terminal's signal: a second one within this time is the same Ctrl-C."""

logger = logging.getLogger("genserve.serve")


class Server:
    """tritonserver that is restarted when it or one of its stubs dies or hangs.

    Triton stays ready when a stub dies, and never answers the stub's requests.

    Args:
        options: Models and addresses.
        on_ready: Called each time the server becomes ready.
    """

    def __init__(self, options: ServeOptions, *, on_ready: Callable[[], None] = lambda: None) -> None:
        self._options = options
        self._on_ready = on_ready
        self._state = ServerState.of(options.http_port)
        self._gateway = GatewayProcess(options) if options.gateway_port else None
        # Plain values: a signal handler that sets an Event deadlocks if the main thread holds its lock.
        self._stop_signal: int | None = None
        self._stopping_since = 0.0

    def run(self) -> None:
        """Serve until SIGTERM or Ctrl-C.

        Raises:
            ServeError: The server does not start, or dies repeatedly.
        """
        logs.configure()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        _require_stopped(self._state)
        check_ports(self._options)
        self._state.create()
        self._clean()
        self._state.write(self._options, ready=False)
        failure = None
        try:
            render(self._options, self._state.repository)  # report a wrong path before the download
            self._serve(find_triton())
        except ServeError as error:
            failure = str(error)
            raise
        finally:
            self._stop_gateway(0.0)
            self._clean()
            if failure:
                self._state.write(self._options, ready=False, error=failure)
            else:
                self._state.remove()

    def _serve(self, triton: Triton) -> None:
        log(logger, logging.INFO, "starting", triton=triton.source, repository=self._options.repository)
        was_ready = False
        failed_starts = 0
        while not self._is_stopping:
            try:
                cause = self._serve_once(triton)
            except ServeError as error:
                failed_starts += 1
                if not was_ready or failed_starts == MAX_FAILED_STARTS:
                    raise
                cause = str(error)
                self._pause(FAILED_START_PAUSE_S)
            else:
                was_ready, failed_starts = True, 0
            if not self._is_stopping:
                log(logger, logging.ERROR, "restarting", cause=cause)
        log(logger, logging.INFO, "stopped")

    def _serve_once(self, triton: Triton) -> str | None:
        """Run one tritonserver until it stops. Return the cause of a failure, None after a stop signal."""
        self._clean()
        rendered = render(self._options, self._state.repository)
        process = TritonProcess(triton, self._options, repository=self._state.repository, board=self._state.board)
        watch = Watch(process, hang_timeout_s=rendered.hang_timeout_s)
        drain_s = 0.0  # no requests before it is ready
        try:
            started = time.monotonic()
            self._wait_ready(process, watch)
            if self._is_stopping:
                return None
            self._state.write(self._options, ready=True)
            log(logger, logging.INFO, "ready", models=",".join(rendered.models), seconds=time.monotonic() - started)
            self._on_ready()
            drain_s = float(self._options.exit_timeout_s)
            cause = self._wait_for_failure(watch)
            if cause:
                self._state.write(self._options, ready=False)
                drain_s = LOSS_DRAIN_S
            return cause
        finally:
            if self._stop_signal is not None:
                log(logger, logging.INFO, "stopping", signal=signal.Signals(self._stop_signal).name)
                drain_s -= self._stop_gateway(drain_s)  # first, while tritonserver still takes its requests
            process.stop(max(0.0, drain_s))

    def _wait_ready(self, process: TritonProcess, watch: Watch) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_stopping and not (process.poll_ready() and self._gateway_is_healthy()):
            if hanging := watch.hang():
                raise ServeError(hanging)
            if time.monotonic() > deadline:
                raise ServeError(f"the server was not ready within {START_TIMEOUT_S:g} s; its log says why")
            self._pause(POLL_S)

    def _wait_for_failure(self, watch: Watch) -> str | None:
        """Wait until a part dies or hangs and return the cause, None after a stop signal."""
        while not self._pause(POLL_S):
            cause = watch.failure()
            if cause:
                return cause
        return None

    def _pause(self, seconds: float) -> bool:
        """Sleep until the time is over or a stop signal arrives. Return whether the server is stopping."""
        until = time.monotonic() + seconds
        while not self._is_stopping and time.monotonic() < until:
            if self._gateway:
                self._gateway.keep_running()
            time.sleep(POLL_S)
        return self._is_stopping

    def _gateway_is_healthy(self) -> bool:
        return self._gateway is None or self._gateway.is_healthy()

    def _stop_gateway(self, drain_s: float) -> float:
        """End the gateway. Return the seconds that it took."""
        started = time.monotonic()
        if self._gateway:
            self._gateway.stop(drain_s)
        return time.monotonic() - started

    @property
    def _is_stopping(self) -> bool:
        return self._stop_signal is not None

    def _clean(self) -> None:
        shutil.rmtree(self._state.repository, ignore_errors=True)
        for board in self._state.folder.glob(f"{self._state.board.name}*"):
            board.unlink(missing_ok=True)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._stop_signal is None:
            self._stop_signal, self._stopping_since = number, now
        elif number == signal.SIGINT and now - self._stopping_since > SAME_CTRL_C_S:
            raise KeyboardInterrupt  # a second Ctrl-C skips the drain


def _require_stopped(state: ServerState) -> None:
    running = state.process()
    if running:
        raise ServeError(
            f"a server runs on HTTP port {state.http_port} already (process {running.pid});"
            f" genserve stop --http-port {state.http_port} ends it"
        )


def start_detached(arguments: list[str], options: ServeOptions) -> ServerState:
    """Start ``genserve serve ARGUMENTS`` in the background and wait until it is ready.

    Args:
        arguments: Command-line arguments equivalent to `options`.
        options: Options to check before the start, so that errors and the notice of a first fetch appear here.

    Raises:
        ServeError: The server did not become ready.
    """
    state = ServerState.of(options.http_port)
    _require_stopped(state)
    check_ports(options)
    with tempfile.TemporaryDirectory() as folder:
        render(options, Path(folder) / "repository")
    find_triton()
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
    try:
        while process.poll() is None:
            record = state.read()
            if record and record["ready"]:
                return state
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    raise ServeError((state.read() or {}).get("error") or f"{_logged_failure(state)} (log: {state.log})")


def _logged_failure(state: ServerState) -> str:
    """Return the last failure in the log of a server that ended without recording a reason."""
    lines = [line for line in state.log.read_text(errors="replace").splitlines() if line.startswith("genserve: ")]
    return lines[-1].removeprefix("genserve: ") if lines else "the server ended while it started"
