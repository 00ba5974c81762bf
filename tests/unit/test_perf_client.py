"""The client's studies: verdicts, and the checks of answers and of the files of `genserve map`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from genserve import GeneratedImage, ServerUnavailable
from simulated.load import Answers, Request, draw_requests
from simulated.picture import draw, expected_picture
from studies import client_overhead, client_scaling
from studies.client_overhead import PLAIN
from studies.client_scaling import EVEN, LOOP, UNEVEN
from studies.map_kills import check_results, write_tasks


def png(request: Request) -> bytes:
    buffer = io.BytesIO()
    draw(expected_picture(request["prompt"], request["seed"], request["steps"])).save(buffer, "PNG")
    return buffer.getvalue()


def image(request: Request, server: str = "simulated-0") -> GeneratedImage:
    return GeneratedImage(png(request), request["seed"], {"model": server})


def answers(seconds: float, *by_server: int) -> Answers:
    """Return right answers by server."""
    requests = draw_requests(sum(by_server), steps=[1])
    servers = [f"simulated-{number}" for number, count in enumerate(by_server) for _ in range(count)]
    counted = Answers(len(requests), seconds=seconds)
    for index, (request, server) in enumerate(zip(requests, servers, strict=True)):
        counted.note(index, request, image(request, server), 0.1)
    return counted


def test_right_answers_have_no_faults() -> None:
    counted = answers(2.0, 3, 1)
    assert (counted.faults(), counted.rate) == ([], 2.0)
    assert counted.by_server == {"simulated-0": 3, "simulated-1": 1}


def test_every_kind_of_fault_is_reported() -> None:
    first, second, third, _ = requests = draw_requests(4, steps=[2])
    counted = Answers(len(requests))
    counted.note(0, first, image(first), 0.5)
    counted.note(0, first, image(first), 2.0)
    counted.note(1, second, GeneratedImage(png(first), second["seed"], {"model": "simulated-0"}), 0.1)
    counted.note(2, third, ServerUnavailable("gone"), 0.1)
    assert counted.longest_s == 2.0
    assert counted.faults() == [
        "1 requests without an answer",
        "1 requests with two answers",
        "1 requests with a wrong image",
        "1 requests failed: ServerUnavailable: gone",
    ]


def scaling(even: Answers, uneven_s: float = 8.0) -> list[str]:
    results = {LOOP: (answers(20, 5, 5, 5, 5), 1.0), EVEN: (even, 4.0), UNEVEN: (answers(uneven_s, 8, 8, 8, 2), 3.25)}
    return client_scaling.broken_promises(results)


def test_kept_promises_of_scaling_are_not_reported() -> None:
    assert scaling(answers(20, 20, 19, 21, 20)) == []


@pytest.mark.parametrize(
    ("even", "uneven_s", "parts"),
    [
        (answers(21.2, 20, 20, 20, 20), 8.0, ["3.77 times the rate", "3.8"]),
        (answers(20, 20, 20, 22, 18), 8.0, ["server 2 answered 22", "20 within 5%"]),
        (answers(20, 20, 20, 20, 20), 9.1, ["0.88 of the ideal", "0.9"]),
    ],
)
def test_broken_promise_of_scaling_names_its_number(even: Answers, uneven_s: float, parts: list[str]) -> None:
    broken = scaling(even, uneven_s)
    assert all(part in broken[0] for part in parts)


def test_broken_promises_of_overhead() -> None:
    def medians(verb: str, ours: float) -> dict[str, dict[tuple[str, str], float]]:
        return {verb: {("grpc", PLAIN): 1.0, ("grpc", "Client"): ours}}

    assert client_overhead.broken_promises(medians("rerank", 1.09), 0.29, False) == []
    assert client_overhead.broken_promises(medians("generate", 1.019), 0.29, False) == []
    assert len(client_overhead.broken_promises(medians("rerank", 1.11), 0.29, False)) == 1
    assert len(client_overhead.broken_promises(medians("generate", 1.03), 0.29, False)) == 1
    assert len(client_overhead.broken_promises({}, 0.31, True)) == 2


def test_contenders_take_turns_with_different_requests() -> None:
    seen: list[tuple[str, int]] = []

    def contender(title: str) -> client_overhead.Call:
        def call(number: int) -> float:
            seen.append((title, number))
            return 2.0 if title == "Client" else 1.0

        return call

    contenders = {("grpc", title): contender(title) for title in (PLAIN, "Client")}
    assert client_overhead.take_turns(contenders, 3) == {("grpc", PLAIN): 1.0, ("grpc", "Client"): 2.0}
    assert [number for _, number in seen] == list(range(2 * (3 + client_overhead.WARM_UP)))
    turns = [{one[0], other[0]} for one, other in zip(seen[0::2], seen[1::2], strict=True)]
    assert turns == [{PLAIN, "Client"}] * (3 + client_overhead.WARM_UP)


class Folder:
    """Files of a `genserve map` that has done all of its tasks."""

    def __init__(self, folder: Path) -> None:
        self.results, self.images = folder / "results.jsonl", folder / "images"
        self.images.mkdir()
        self.by_id = write_tasks(folder / "tasks.jsonl", draw_requests(3, steps=[1, 2]))
        self.lines: list[dict[str, Any]] = []
        for name, request in self.by_id.items():
            file = self.images / f"{name}.png"
            file.write_bytes(png(request))
            self.lines.append({"id": name, "ok": True, "file": str(file)})

    def check(self, tail: str = "") -> tuple[int, list[str]]:
        self.results.write_text("".join(f"{json.dumps(line)}\n" for line in self.lines) + tail)
        return check_results(self.results, self.images, self.by_id)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_complete_results_have_no_faults(folder: Folder) -> None:
    assert folder.check() == (3, [])


def test_missing_and_repeated_lines_are_faults(folder: Folder) -> None:
    folder.lines[2] = folder.lines[0]
    right, faults = folder.check()
    assert right == 2
    assert faults == ["1 files in the image folder have no line", "1 tasks have no line", "1 tasks have several lines"]


def test_half_a_line_is_a_fault(folder: Folder) -> None:
    assert folder.check('{"id": "task-0') == (3, ["1 lines are not JSON"])


def test_half_an_image_is_a_fault(folder: Folder) -> None:
    file = Path(folder.lines[1]["file"])
    file.write_bytes(file.read_bytes()[:-20])
    assert folder.check()[0] == 2


def test_image_of_another_task_is_a_fault(folder: Folder) -> None:
    first, second, _ = (Path(line["file"]) for line in folder.lines)
    second.write_bytes(first.read_bytes())
    assert folder.check() == (2, ["1 images are broken or belong to another task"])


def test_failed_task_is_a_fault(folder: Folder) -> None:
    Path(folder.lines[0]["file"]).unlink()
    folder.lines[0] = {"id": folder.lines[0]["id"], "ok": False, "error": {"class": "ServerError", "message": "no"}}
    right, faults = folder.check()
    assert right == 2
    assert "ServerError" in faults[0]
