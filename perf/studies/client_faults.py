"""Faults of servers during `map_generate`: one of four is killed, stopped or restarted, or three of them at once.

Each server is real, except for its device, which takes a fixed time per step and image and returns a picture of the
request. With --check it fails unless every request gets exactly one answer, with the right picture.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import click
from rich import box

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import COUNT, SETTINGS, fail, judge, new_table, show
from genserve import Client, GenServeError
from genserve.serve.options import ServeError
from simulated.fleet import PROTOCOLS, SimulatedServer, fleet
from simulated.load import Answers, Request, draw_requests, map_all

SERVERS = 4
STEPS = (2, 4, 6)
AFTER = 0.1
"""Share of the answers after which the first fault occurs; further ones follow after as much again."""
PAUSE_S = 40.0
"""Length of the fault that passes."""

Fault = Callable[[SimulatedServer], None]


def kill(server: SimulatedServer) -> None:
    """Kill all processes of the server for good."""
    server.kill()


def stop(server: SimulatedServer) -> None:
    """Stop tritonserver for good."""
    server.suspend()


def pause(server: SimulatedServer) -> None:
    """Stop tritonserver for a while."""
    server.suspend()
    time.sleep(PAUSE_S)
    server.resume()


def restart(server: SimulatedServer) -> None:
    """Restart the server in order."""
    server.restart()


SCENARIOS: Mapping[str, Sequence[Fault]] = {
    "no fault": (),
    "killed (SIGKILL)": (kill,),
    "stopped (SIGSTOP)": (stop,),
    f"stopped for {PAUSE_S:g} s": (pause,),
    "restarted": (restart,),
    "killed, stopped and restarted": (kill, stop, restart),
}
"""Faults, one server each, the last server first."""


class Injector:
    """Faults in threads of their own, at certain numbers of answers.

    Args:
        servers: The servers; the last one gets the first fault.
        faults: At most one fault per server.
        requests: Number of requests of the load.
    """

    def __init__(self, servers: Sequence[SimulatedServer], faults: Sequence[Fault], requests: int) -> None:
        self._due = {
            max(1, round(number * AFTER * requests)): (fault, server)
            for number, (fault, server) in enumerate(zip(faults, reversed(servers), strict=False), start=1)
        }
        self._threads: list[threading.Thread] = []
        self._errors: list[Exception] = []

    def on_answer(self, number: int) -> None:
        """Start the fault that is due after `number` answers."""
        if number in self._due:
            thread = threading.Thread(target=self._run, args=self._due[number])
            thread.start()
            self._threads.append(thread)

    def finish(self) -> None:
        """Wait for the faults to end.

        Raises:
            ServeError: A fault could not be caused.
        """
        for thread in self._threads:
            thread.join()
        if self._errors or len(self._threads) < len(self._due):
            raise ServeError(f"not every fault occurred: {self._errors or 'the load ended before'}")

    def _run(self, fault: Fault, server: SimulatedServer) -> None:
        try:
            fault(server)
        except Exception as error:
            self._errors.append(error)


def run(
    servers: Sequence[SimulatedServer], requests: Sequence[Request], faults: Sequence[Fault], *, protocol: str
) -> Answers:
    """Send a load while faults occur; every server runs again at the end.

    Raises:
        ServeError: A fault could not be caused, or a server did not start again.
    """
    injector = Injector(servers, faults, len(requests))
    try:
        with Client([server.url(protocol) for server in servers]) as client:
            answers = map_all(client, requests, on_answer=injector.on_answer)
    finally:
        injector.finish()
        for server in servers:
            server.repair()
    return answers


@click.command(context_settings=SETTINGS)
@click.option("--requests", type=COUNT, default=1000, show_default=True, help="Requests of each load.")
@click.option("--step-s", type=click.FloatRange(0.001), default=0.05, show_default=True, help="Seconds per step.")
@click.option("--protocol", type=click.Choice(PROTOCOLS), default="grpc", show_default=True)
@click.option("--check", is_flag=True, help="Fail unless every request gets one right answer.")
def main(requests: int, step_s: float, protocol: str, check: bool) -> None:
    """Kill, stop and restart servers under the load of one client."""
    results: dict[str, Answers] = {}
    try:
        with fleet([step_s] * SERVERS) as servers:
            for title, faults in SCENARIOS.items():
                click.echo(title, err=True)
                results[title] = run(servers, draw_requests(requests, steps=STEPS), faults, protocol=protocol)
    except (ServeError, GenServeError) as error:
        fail(error)
    drawn = new_table("Fault", "Requests", "Right", "Errors", "By server", "Seconds", "Longest, s")
    drawn.box = box.MARKDOWN
    for title, answers in results.items():
        shares = ", ".join(str(answers.by_server[f"simulated-{number}"]) for number in range(SERVERS))
        right, errors = str(answers.by_server.total()), str(answers.errors.total())
        times = f"{answers.seconds:.1f}", f"{answers.longest_s:.1f}"
        drawn.add_row(title, str(answers.requests), right, errors, shares, *times)
    show(drawn, f"{SERVERS} servers over {protocol}, {', '.join(map(str, STEPS))} steps of {step_s:g} s")
    judge([f"{title}: {line}" for title, answers in results.items() for line in answers.faults()], check=check)


if __name__ == "__main__":
    main()
