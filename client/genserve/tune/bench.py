"""Servers that trials measure: started as needed, one loaded at a time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from genserve.aio import AsyncClient
from genserve.background import LOOP
from genserve.client import Client
from genserve.errors import GenServeError
from genserve.serve.options import ServeError
from genserve.serve.own_server import own_server
from genserve.serve.repository import instance_count
from genserve.tune.interrupts import Interrupts
from genserve.tune.load import Arguments, Load, Sample, TrialFailed, drive
from genserve.tune.search import Values
from genserve.types import InstanceLoad

STOP_S = 5.0
"""Seconds for a server to stop; after them its processes are killed."""
WARM_UP = 10**9
"""Number of the first request that warms a server up: no block has it."""
MEMORY_RESERVE = 1.25
"""Memory for another server, as a multiple of what the first one's instances take."""
LOOK_S = 30.0
ANSWER_S = 60.0
"""Seconds by which a request may outlast its block: the block ends it."""
KEPT_FIGURES = 3
"""Starts that the estimate of the next one looks at."""


@dataclass
class Running:
    """Server that runs, or starts."""

    values: Values
    stack: ExitStack
    address: str = ""


class Bench:
    """Servers of one model.

    Two servers stay alive side by side if the devices have the memory, so that blocks need no starts between them.

    Args:
        load: The load.
        environment: Variables of every server, besides the values.
        variables: Names of all tuned variables.
        options: Options of `genserve serve`.
        log: File for the log of the server that stopped last.
        interrupts: Keeps signals while servers are being stopped.
    """

    def __init__(
        self,
        load: Load,
        *,
        environment: Mapping[str, str],
        variables: Sequence[str],
        options: Sequence[str],
        log: Path,
        interrupts: Interrupts,
    ) -> None:
        self._load = load
        self._environment = dict(environment)
        self._variables = variables
        self._options = options
        self._log = log
        self._interrupts = interrupts
        self._alive: list[Running] = []
        self._starts: list[float] = []
        self._blocks: list[float] = []
        self._stop_s = 0.0
        self.instances: tuple[InstanceLoad, ...] = ()
        """Instances of the first server, after its warm-up."""
        self.count = max(2, load.in_flight)
        """Requests of a block."""

    def calibrate(self, values: Values, *, block_s: float, deadline: float) -> None:
        """Start the first server, and choose the requests of a block so that it takes about `block_s` seconds.

        Args:
            values: Tuned variables.
            block_s: Seconds of a block.
            deadline: Time of `time.monotonic` at which both have to have ended.

        Raises:
            TrialFailed: The server does not start, or does not answer.
        """
        running = self._start(values, deadline - time.monotonic())
        sample = self._drive(running, self._load.block(0, self.count), deadline - time.monotonic())
        rounds = max(2, math.floor(block_s / sample.seconds + 0.5))
        self.count *= rounds
        self._blocks = [sample.seconds * rounds]

    def block(self, values: Values, number: int, *, start_s: float, block_s: float) -> Sample:
        """Run a block on a server with these values, see `search.Bench`."""
        try:
            running = next((each for each in self._alive if each.values == values), None) or self._start(
                values, start_s
            )
            sample = self._drive(running, self._load.block(number, self.count), block_s)
        except TrialFailed:
            self.drop(values)
            raise
        self._blocks = [*self._blocks, sample.seconds][-2 * KEPT_FIGURES :]
        return sample

    def drop(self, values: Values) -> None:
        """Stop the server with these values."""
        for running in [each for each in self._alive if each.values == values]:
            with self._interrupts.held():
                started = time.monotonic()
                self._alive.remove(running)
                running.stack.close()
                self._stop_s = max(self._stop_s, time.monotonic() - started)

    def close(self) -> None:
        """Stop all servers."""
        with self._interrupts.held():
            for running in list(self._alive):
                self.drop(running.values)

    def seconds(self, blocks: int, *, starts: int) -> float:
        """Return the time that blocks of servers in turn are expected to take, see `search.Bench`."""
        restart_s = max(self._starts[-KEPT_FIGURES:], default=0.0) + self._stop_s
        block_s = statistics.median(self._blocks or [0.0])
        count = len(self.instances) // max(1, len({each.device for each in self.instances}))
        if not self._have_room(self.instances, count):
            starts = max(starts, blocks)
        return starts * restart_s + blocks * block_s

    def _have_room(self, instances: Sequence[InstanceLoad], count: int) -> bool:
        """Return whether devices have the memory for another server with `count` instances each, by what is free now.

        Args:
            instances: Instances of a server that runs.
            count: Instances per device.
        """
        used = max((each.memory_used or math.inf for each in self.instances), default=math.inf)
        return all(MEMORY_RESERVE * used * count <= (each.memory_free or 0) for each in instances)

    def _start(self, values: Values, limit_s: float) -> Running:
        started = time.monotonic()
        try:
            count = instance_count(self._load.model, values)
        except ServeError as error:
            raise TrialFailed(str(error)) from None
        if self._alive and not self._have_room(self._look(self._alive[-1]), count):
            self.close()
        running = Running(values, ExitStack())
        self._alive.append(running)
        # An empty variable counts as one that is not set.
        given = {**self._environment, **dict.fromkeys(self._variables, ""), **values}
        try:
            addresses = running.stack.enter_context(
                own_server(
                    (self._load.model,),
                    log=self._log,
                    # Blocks of a file's tasks repeat them: a cache of scores would answer them.
                    environment={**given, "SCORE_CACHE_BYTES": "0"},
                    options=self._options,
                    timeout_s=limit_s,
                    stop_timeout_s=STOP_S,
                )
            )
        except ServeError as error:
            raise TrialFailed(str(error).partition("; its log is ")[0]) from None
        running.address = addresses["grpc"]
        requests = [self._load.request(WARM_UP + index) for index in range(max(2, self._load.in_flight))]
        self._drive(running, requests, max(1.0, limit_s - (time.monotonic() - started)))
        self._starts.append(time.monotonic() - started)
        self.instances = self.instances or self._look(running)
        return running

    def _look(self, running: Running) -> tuple[InstanceLoad, ...]:
        try:
            with Client(running.address, timeout=LOOK_S) as client:
                return tuple(each for each in client.gpu_load() if each.model == self._load.model)
        except GenServeError as error:
            raise TrialFailed(f"{type(error).__name__}: {error}") from None

    def _drive(self, running: Running, requests: Sequence[Arguments], limit_s: float) -> Sample:
        async def measure() -> Sample:
            async with AsyncClient(running.address, timeout=limit_s + ANSWER_S) as client:
                return await drive(client, self._load, requests, limit_s=limit_s)

        return LOOP.run(measure())
