"""The study of durable tasks: the check of their results."""

from __future__ import annotations

import io
from copy import deepcopy
from typing import Any

import pytest

from simulated.load import Request, draw_requests
from simulated.picture import draw, expected_picture
from studies.gateway_tasks import Watcher, check

REQUESTS = dict(zip("abc", draw_requests(3, steps=[2]), strict=True))


class Files:
    """Caller that has the file of each task."""

    def __init__(self) -> None:
        self.files = {f"/files/{name}": png(request) for name, request in REQUESTS.items()}

    def file(self, url: str) -> bytes:
        return self.files.get(url, b"")


def png(request: Request) -> bytes:
    buffer = io.BytesIO()
    draw(expected_picture(request["prompt"], request["seed"], request["steps"])).save(buffer, "PNG")
    return buffer.getvalue()


def tasks() -> list[dict[str, Any]]:
    return [
        {
            "id": name,
            "state": "done",
            "error": None,
            "ended_at": 1.0,
            "result": {"seed": request["seed"], "url": f"/files/{name}"},
        }
        for name, request in REQUESTS.items()
    ]


def verdict(found: list[dict[str, Any]], files: Files | None = None, watcher: Watcher | None = None) -> tuple[int, Any]:
    return check(files or Files(), REQUESTS, found, watcher or Watcher())  # type: ignore[arg-type]


def test_all_right() -> None:
    assert verdict(tasks()) == (3, [])


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"state": "failed", "result": None, "error": "e"}, "1 tasks are failed: e"),
        ({"result": {"seed": 1, "url": "/files/a"}}, "1 images are broken or belong to another task"),
        ({"id": "d"}, "1 tasks were never asked for"),
    ],
)
def test_wrong_task(change: dict[str, Any], fault: str) -> None:
    found = tasks()
    found[0] |= change
    right, faults = verdict(found)
    assert (right, fault in faults) == (2, True)


@pytest.mark.parametrize("data", [b"", png(REQUESTS["a"])[:-20], png(REQUESTS["b"])], ids=["no", "half", "another"])
def test_wrong_file(data: bytes) -> None:
    files = Files()
    files.files["/files/a"] = data
    assert verdict(tasks(), files) == (2, ["1 images are broken or belong to another task"])


def test_lost_and_repeated_tasks() -> None:
    found = tasks()
    assert verdict(found[1:])[1] == ["1 tasks were accepted and are lost"]
    assert "1 tasks are there twice" in verdict([*found, found[0]])[1]
    found[0]["result"]["url"] = "/files/b"
    assert "1 images belong to several tasks" in verdict(found)[1]


def test_change_after_the_end() -> None:
    watcher, running, later = Watcher(), tasks(), deepcopy(tasks())
    running[0] |= {"state": "running", "result": None, "ended_at": None}
    watcher.note(running)
    later[1]["result"]["url"] = "http://localhost:1/files/b"  # another gateway's address
    later[2]["ended_at"] = 2.0
    watcher.note(later)
    assert watcher.changed == {"c"}
    assert verdict(tasks(), watcher=watcher) == (2, ["1 tasks changed after they had finished"])
