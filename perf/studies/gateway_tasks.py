"""Durable tasks while gateways and servers are killed at random: each has exactly one result, the right one.

The gateways share one database and one folder of results. The servers are real, except for their devices, which return
a picture of each request. With --check it fails unless every task that was accepted is done, its image is whole and the
right one, and nothing about it changes any more once it is done.
"""

from __future__ import annotations

import io
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
from PIL import Image
from rich import box

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import COUNT, SETTINGS, fail, judge, new_table, show
from genserve.serve.options import ServeError
from simulated.fleet import SimulatedServer, fleet
from simulated.gateways import Caller, GatewayProcess, Task, gateways
from simulated.load import Request, draw_requests
from simulated.picture import shows
from studies.map_kills import PNG_END

SERVERS = 4
GATEWAYS = 2
STEPS = (2, 4, 6)
POLL_S = 0.5
JITTER_S = 0.5
"""Longest time between the task after which a kill is due and the kill, so that it meets any moment of a task."""
DOWN_S = 2.0
"""Longest time that a killed gateway is down."""
LAST_KILL = 0.8
"""Share of the tasks after which no kill is due."""
STALL_S = 180.0
"""Seconds without another finished task after which a run has failed."""


Victim = GatewayProcess | SimulatedServer


@dataclass
class Outcome:
    """Result of a run.

    Attributes:
        tasks: Number of tasks.
        kills: Names of what was killed, in order.
        seconds: Length of the run.
        right: Tasks with one result, the right one.
        repeated: Tasks that were started more than once.
        faults: Descriptions of everything that should not be.
    """

    tasks: int
    kills: list[str] = field(default_factory=list)
    seconds: float = 0.0
    right: int = 0
    repeated: int = 0
    faults: list[str] = field(default_factory=list)


class Watcher:
    """Record of the first finished state of each task."""

    def __init__(self) -> None:
        self.first: dict[str, Task] = {}
        self.changed: set[str] = set()

    def note(self, tasks: Sequence[Task]) -> None:
        """Note the tasks that have finished, and those that are no longer as they were when they finished."""
        for task in tasks:
            before = self.first.get(task["id"])
            if before is not None and before != essence(task):
                self.changed.add(task["id"])
            elif before is None and task["state"] not in {"queued", "running"}:
                self.first[task["id"]] = essence(task)


def essence(task: Task) -> Task:
    """Return the fields that may not change once a task has finished. The rest of a URL is its gateway's address."""
    result = task["result"] and {**task["result"], "url": task["result"]["url"].rpartition("/")[2]}
    return {"state": task["state"], "ended_at": task["ended_at"], "result": result}


class Killer:
    """Kills at certain numbers of finished tasks, in threads of their own."""

    def __init__(
        self, gateways: Sequence[GatewayProcess], servers: Sequence[SimulatedServer], tasks: int, kills: int, seed: int
    ) -> None:
        self._draw = random.Random(seed)
        self._due = sorted(self._draw.sample(range(1, round(LAST_KILL * tasks)), kills), reverse=True)
        self._gateways = gateways
        self._servers = servers
        self._threads: list[threading.Thread] = []
        self._down: set[str] = set()
        self._errors: list[Exception] = []
        self.killed: list[str] = []

    def note(self, finished: int) -> None:
        """Start the kills that are due: gateways and servers in turn, each time a random one of those that run."""
        while self._due and finished >= self._due[-1]:
            victims: Sequence[Victim] = self._servers if len(self.killed) % 2 else self._gateways
            up = [victim for victim in victims if victim.name not in self._down]
            if not up:
                return
            self._due.pop()
            victim = self._draw.choice(up)
            self._down.add(victim.name)
            self.killed.append(victim.name)
            thread = threading.Thread(target=self._kill, args=(victim, self._draw.uniform(0, 1)))
            thread.start()
            self._threads.append(thread)

    def finish(self) -> None:
        """Wait until everything runs again.

        Raises:
            ServeError: Something does not, or a kill was never due.
        """
        for thread in self._threads:
            thread.join()
        if self._errors or self._due:
            raise ServeError(f"not every kill succeeded: {self._errors or 'the tasks ended before'}")

    def _kill(self, victim: Victim, share: float) -> None:
        try:
            time.sleep(share * JITTER_S)
            victim.kill()
            if isinstance(victim, SimulatedServer):
                victim.repair()
            else:
                time.sleep(share * DOWN_S)
                victim.start()
        except Exception as error:
            self._errors.append(error)
        finally:
            self._down.discard(victim.name)


def run(
    folder: Path,
    servers: Sequence[SimulatedServer],
    requests: Sequence[Request],
    *,
    kills: int,
    seed: int,
    database: str | None = None,
) -> Outcome:
    """Submit all requests as tasks to two gateways, kill gateways and servers, and check the results.

    Args:
        folder: Folder for the database, the images and the gateways' logs.
        servers: The servers.
        requests: Arguments of generate.
        kills: Number of kills, half of them of gateways.
        seed: Seed of their moments.
        database: Address of the database, if it is not a file in the folder.

    Raises:
        ServeError: A gateway or server did not start again, or no task ends any more.
    """
    outcome, watcher = Outcome(len(requests)), Watcher()
    started = time.monotonic()
    with gateways(folder, [server.url("grpc") for server in servers], GATEWAYS, database) as running:
        caller, submitter = Caller(running), Caller(running)
        killer = Killer(running, servers, len(requests), kills, seed)
        ids: list[str] = []
        submitting = threading.Thread(target=lambda: ids.extend(map(submitter.submit, range(len(requests)), requests)))
        submitting.start()
        try:
            _wait(caller, watcher, killer, len(requests))
        finally:
            killer.finish()
            submitting.join()
        tasks = caller.tasks()
        watcher.note(tasks)
        again = [submitter.submit(number, request) for number, request in enumerate(requests)]
        outcome.seconds = time.monotonic() - started
        outcome.kills = killer.killed
        outcome.repeated = sum(task["attempts"] > 1 for task in tasks)
        outcome.right, outcome.faults = check(caller, dict(zip(ids, requests, strict=True)), tasks, watcher)
        if again != ids or len(ids) != len(requests):
            outcome.faults.append("a request that was sent again became another task")
    return outcome


def check(
    caller: Caller, requests: dict[str, Request], tasks: Sequence[Task], watcher: Watcher
) -> tuple[int, list[str]]:
    """Return the number of tasks with one result, the right one, and descriptions of everything that should not be."""
    faults: Counter[str] = Counter()
    right = 0
    for task in tasks:
        request = requests.get(task["id"])
        if request is None:
            faults["tasks were never asked for"] += 1
        elif task["state"] != "done":
            faults[f"tasks are {task['state']}: {task['error']}"] += 1
        elif task["id"] in watcher.changed:
            faults["tasks changed after they had finished"] += 1
        elif not is_right(caller.file(task["result"]["url"]), request) or task["result"]["seed"] != request["seed"]:
            faults["images are broken or belong to another task"] += 1
        else:
            right += 1
    faults["tasks were accepted and are lost"] = len(requests.keys() - {task["id"] for task in tasks})
    faults["tasks are there twice"] = len(tasks) - len({task["id"] for task in tasks})
    files = Counter(task["result"]["url"] for task in tasks if task["result"])
    faults["images belong to several tasks"] = sum(count > 1 for count in files.values())
    return right, [f"{count} {fault}" for fault, count in faults.items() if count]


def is_right(data: bytes, request: Request) -> bool:
    """Return whether these bytes are the whole image of a request."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            right = shows(image, request["prompt"], request["seed"], request["steps"])
        return right and data.endswith(PNG_END)  # Pillow reads a file without its end
    except (OSError, SyntaxError):  # Pillow raises the latter for a broken PNG
        return False


def _wait(caller: Caller, watcher: Watcher, killer: Killer, tasks: int) -> None:
    """Wait until all tasks have finished."""
    changed, before = time.monotonic(), -1
    while len(watcher.first) < tasks:
        watcher.note(caller.tasks())
        killer.note(len(watcher.first))
        if len(watcher.first) > before:
            changed, before = time.monotonic(), len(watcher.first)
        if time.monotonic() - changed > STALL_S:
            raise ServeError(f"no task has ended for {STALL_S:g} s; {before} of {tasks} have")
        time.sleep(POLL_S)


@click.command(context_settings=SETTINGS)
@click.option("--tasks", type=click.IntRange(min=10), default=1000, show_default=True)
@click.option("--kills", type=COUNT, default=12, show_default=True, help="Kills, gateways and servers in turn.")
@click.option("--step-s", type=click.FloatRange(0.001), default=0.05, show_default=True, help="Seconds per step.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the moments of the kills.")
@click.option("--database", metavar="URL", help="Database of the tasks.  [default: an SQLite file]")
@click.option("--check", "is_checked", is_flag=True, help="Fail unless every task has one result, the right one.")
def main(tasks: int, kills: int, step_s: float, seed: int, database: str | None, is_checked: bool) -> None:
    """Kill gateways and servers while they have durable tasks, and check the results."""
    try:
        with (
            tempfile.TemporaryDirectory(prefix="genserve-tasks-") as folder,
            fleet([step_s] * SERVERS) as servers,
        ):
            requests = draw_requests(tasks, steps=STEPS)
            outcome = run(Path(folder), servers, requests, kills=kills, seed=seed, database=database)
    except ServeError as error:
        fail(error)
    drawn = new_table("Tasks", "Killed", "Seconds", "Right", "Started more than once")
    drawn.box = box.MARKDOWN
    count = sum(name.startswith("gateway") for name in outcome.kills)
    killed = f"{count} gateways, {len(outcome.kills) - count} servers"
    drawn.add_row(str(tasks), killed, f"{outcome.seconds:.0f}", str(outcome.right), str(outcome.repeated))
    show(drawn, f"{GATEWAYS} gateways, {SERVERS} servers, {', '.join(map(str, STEPS))} steps of {step_s:g} s")
    judge(outcome.faults, check=is_checked)


if __name__ == "__main__":
    main()
