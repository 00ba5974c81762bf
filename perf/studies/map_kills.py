"""`genserve map` that is killed three times and started again: every task ends up in the results exactly once.

The tasks go to four servers, real except for their devices, which return a picture of each request. With --check it
fails unless every id is in the results once, every line is whole, and every image is whole and the right one.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
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
from simulated.fleet import fleet
from simulated.load import Request, draw_requests
from simulated.picture import shows

SERVERS = 4
STEPS = (1, 2, 3)
PNG_END = b"IEND\xaeB`\x82"
"""Last chunk of a PNG file, with its checksum."""
POLL_S = 0.02
JITTER_S = 0.3
"""Longest time between the line after which a kill is due and the kill, so that it meets any moment of a task."""
LAST_KILL = 0.9
"""Share of the tasks after which no kill is due."""
STALL_S = 120.0
"""Seconds without a new line after which a run has failed."""


@dataclass
class Outcome:
    """Result of all runs.

    Attributes:
        tasks: Number of tasks.
        kills: Lines in the results at each kill.
        seconds: Time of all runs together.
        right: Tasks with one line and the right image.
        faults: Descriptions of everything else.
    """

    tasks: int
    kills: list[int] = field(default_factory=list)
    seconds: float = 0.0
    right: int = 0
    faults: list[str] = field(default_factory=list)


def write_tasks(path: Path, requests: Sequence[Request]) -> dict[str, Request]:
    """Write one task per line, and return the requests by id."""
    by_id = {f"task-{index:05}": request for index, request in enumerate(requests)}
    path.write_text("".join(f"{json.dumps({'id': name, **each})}\n" for name, each in by_id.items()), encoding="utf-8")
    return by_id


def count_lines(path: Path) -> int:
    """Return the number of whole lines, 0 before the file exists."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def check_results(results: Path, images: Path, by_id: dict[str, Request]) -> tuple[int, list[str]]:
    """Return the number of tasks with one line and the right image, and descriptions of everything else."""
    faults: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    right = 0
    named = set()
    for line in results.read_text(encoding="utf-8").splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            faults["lines are not JSON"] += 1
            continue
        name = found["id"]
        seen[name] += 1
        if name not in by_id:
            faults["ids are unknown"] += 1
        elif not found["ok"]:
            faults[f"tasks failed: {found['error']}"] += 1
        else:
            file = Path(found["file"])
            named.add(file)
            if is_right(file, by_id[name]):
                right += seen[name] == 1
            else:
                faults["images are broken or belong to another task"] += 1
    faults["files in the image folder have no line"] = len(set(images.iterdir()) - named)
    faults["tasks have no line"] = len(by_id.keys() - seen.keys())
    faults["tasks have several lines"] = sum(count > 1 for count in seen.values())
    return right, [f"{count} {fault}" for fault, count in faults.items() if count]


def is_right(path: Path, request: Request) -> bool:
    """Return whether a file is the whole image of a request."""
    try:
        with Image.open(path) as image:
            right = shows(image, request["prompt"], request["seed"], request["steps"])
        return right and path.read_bytes().endswith(PNG_END)  # Pillow reads a file without its end
    except (OSError, SyntaxError):  # Pillow raises the latter for a broken PNG
        return False


def run(folder: Path, urls: Sequence[str], requests: Sequence[Request], *, kills: int, seed: int) -> Outcome:
    """Run `genserve map` over the tasks, killed `kills` times at random moments, and check its results.

    Args:
        folder: Folder for tasks, results, images and the output of each run.
        urls: Servers.
        requests: Arguments of generate.
        kills: Number of kills.
        seed: Seed of their moments.

    Raises:
        ServeError: A run ended by itself with an error, or stalled.
    """
    draw = random.Random(seed)
    tasks, results, images = folder / "tasks.jsonl", folder / "results.jsonl", folder / "images"
    by_id = write_tasks(tasks, requests)
    command = [sys.executable, "-m", "genserve", "map", str(tasks), "-o", str(results)]
    command += ["--images", str(images), *(word for url in urls for word in ("--url", url))]
    outcome = Outcome(len(requests))
    started = time.monotonic()
    due = sorted(draw.sample(range(1, round(LAST_KILL * len(requests))), kills))
    for number, lines in enumerate([*due, None]):
        log = folder / f"run-{number}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            if lines is None:
                _wait_for_end(process, results, log)
            else:
                _wait_for_lines(process, results, lines, log)
                time.sleep(draw.uniform(0, JITTER_S))
        finally:
            process.kill()
            process.wait()
        if lines is not None:
            outcome.kills.append(count_lines(results))
    outcome.seconds = time.monotonic() - started
    outcome.right, outcome.faults = check_results(results, images, by_id)
    return outcome


def _wait_for_lines(process: subprocess.Popen[bytes], results: Path, lines: int, log: Path) -> None:
    while count_lines(results) < lines:
        _require_progress(process, results, log)
        if process.poll() is not None:
            raise ServeError(f"genserve map ended before it was killed: {_last_line(log)}")
        time.sleep(POLL_S)


def _wait_for_end(process: subprocess.Popen[bytes], results: Path, log: Path) -> None:
    while process.poll() is None:
        _require_progress(process, results, log)
        time.sleep(POLL_S)
    if process.returncode:
        raise ServeError(f"genserve map failed: {_last_line(log)}")


def _require_progress(process: subprocess.Popen[bytes], results: Path, log: Path) -> None:
    changed = max(log.stat().st_ctime, results.stat().st_mtime if results.exists() else 0.0)
    if time.time() - changed > STALL_S:
        raise ServeError(f"genserve map wrote no line for {STALL_S:g} s (process {process.pid}): {_last_line(log)}")


def _last_line(log: Path) -> str:
    return log.read_text(errors="replace").strip().rpartition("\n")[2]


@click.command(context_settings=SETTINGS)
@click.option("--tasks", type=click.IntRange(min=10), default=2000, show_default=True)
@click.option("--kills", type=COUNT, default=3, show_default=True)
@click.option("--step-s", type=click.FloatRange(0.001), default=0.07, show_default=True, help="Seconds per step.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the moments of the kills.")
@click.option("--check", is_flag=True, help="Fail unless every task has one whole line and the right image.")
def main(tasks: int, kills: int, step_s: float, seed: int, check: bool) -> None:
    """Kill and restart `genserve map`, and check its results."""
    try:
        with (
            tempfile.TemporaryDirectory(prefix="genserve-map-") as folder,
            fleet([step_s] * SERVERS) as servers,
        ):
            urls = [server.url("grpc") for server in servers]
            outcome = run(Path(folder), urls, draw_requests(tasks, steps=STEPS), kills=kills, seed=seed)
    except ServeError as error:
        fail(error)
    drawn = new_table("Tasks", "Killed after lines", "Seconds", "Right")
    drawn.box = box.MARKDOWN
    killed = ", ".join(map(str, outcome.kills))
    drawn.add_row(str(outcome.tasks), killed, f"{outcome.seconds:.0f}", str(outcome.right))
    show(drawn, f"{SERVERS} servers, {', '.join(map(str, STEPS))} steps of {step_s:g} s")
    judge(outcome.faults, check=check)


if __name__ == "__main__":
    main()
