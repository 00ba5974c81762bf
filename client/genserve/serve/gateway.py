"""The gateway of a server: a child process that is started again when it ends."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time
from http import HTTPStatus

import urllib3

from genserve.serve.options import ServeError, ServeOptions
from genserve.serve.process import end_with_parent
from genserve_backend.logs import log

RESTART_PAUSE_S = 5.0
"""Seconds between two starts, at least."""
PROBE_TIMEOUT_S = 0.5
LEAST_DRAIN_S = 2.0
"""Seconds for an orderly end without requests."""

logger = logging.getLogger("genserve.serve")


class GatewayProcess:
    """`genserve gateway` in front of the server. It outlives restarts of tritonserver, and answers 503 meanwhile.

    Options that `genserve serve` does not have come from the environment.

    Args:
        options: Addresses, with a gateway port.
    """

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._has_listened = False

    @property
    def pid(self) -> int | None:
        """Process id of the gateway, None if it does not run."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def keep_running(self) -> None:
        """Start the gateway if it does not run.

        Raises:
            ServeError: It ended before it listened for the first time.
        """
        if self.pid is not None:
            return
        if self._process is not None:
            cause = f"the gateway ended with {self._process.returncode}"
            if not self._has_listened:
                raise ServeError(f"{cause} while it started; its log says why")
            if time.monotonic() - self._started < RESTART_PAUSE_S:
                return
            log(logger, logging.ERROR, "restarting the gateway", cause=cause)
        self._started = time.monotonic()
        port, url = str(self._options.gateway_port), self._options.addresses["grpc"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "genserve", "gateway", "--host", self._options.host, "--port", port, "--url", url],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C must reach only this process, which stops the gateway in order
            preexec_fn=end_with_parent,  # noqa: PLW1509  # safe: this process has one thread
        )

    def is_listening(self) -> bool:
        """Return whether the gateway accepts connections."""
        if not self._has_listened and self.pid is not None:
            address = (self._options.local_host.strip("[]"), self._options.gateway_port)
            try:
                socket.create_connection(address, PROBE_TIMEOUT_S).close()
                self._has_listened = True
            except OSError:
                pass
        return self._has_listened

    def is_healthy(self) -> bool:
        """Return whether the gateway answers, and reaches the server. It may still pause after a failed connection."""
        if not self.is_listening():
            return False
        with urllib3.PoolManager(retries=False, timeout=PROBE_TIMEOUT_S) as http:
            try:
                return http.request("GET", f"{self._options.addresses['gateway']}/health").status == HTTPStatus.OK
            except urllib3.exceptions.HTTPError:
                return False

    def stop(self, drain_s: float) -> None:
        """End the gateway once its requests in flight have finished, at the latest after `drain_s` seconds or a few."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(max(drain_s, LEAST_DRAIN_S))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
