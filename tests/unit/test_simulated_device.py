"""The simulated device: pictures that name their request, forwards that take time per row, and the repository."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from PIL import Image
from turned_engine import TurnedEngine

import simulated.engine
from genserve_backend.errors import Cancelled
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.request import FluxRequest, parse
from genserve_backend.settings import FluxSettings
from simulated import DEVICE_ENV, repository
from simulated.load import draw_requests
from simulated.picture import draw, expected_picture, shows
from simulated.repository import SIMULATED_ENGINE, link_checkpoint, render

STEP_S = 0.25


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of each forward, which takes no time here."""
    seconds: list[float] = []

    class Clock:
        sleep = staticmethod(seconds.append)

    monkeypatch.setattr(simulated.engine, "time", Clock)
    return seconds


class Device(TurnedEngine):
    def __init__(self, folder: Path) -> None:
        path = link_checkpoint(folder, "simulated-0")
        self.checkpoint = FluxCheckpoint.load(path)
        super().__init__(lambda emit: simulated.engine.build(FluxSettings(model_path=path), "cpu", emit))

    def parse(self, prompt: str, seed: int, steps: int, **values: Any) -> FluxRequest:
        inputs = {"PROMPT": prompt, "SEED": seed, "STEPS": steps, "HEIGHT": 64, "WIDTH": 64, **values}
        return parse(inputs, self.checkpoint, max_pixels=2**20)


@pytest.fixture
def device(sleeps: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setenv(DEVICE_ENV, str(STEP_S))
    return Device(tmp_path)


def test_picture_shows_exactly_one_request() -> None:
    image = draw(expected_picture("a prompt", 2**63 - 1, 100))
    assert shows(image, "a prompt", 2**63 - 1, 100)
    assert not shows(image, "a prompt.", 2**63 - 1, 100)
    assert not shows(image, "a prompt", 2**63 - 2, 100)
    assert not shows(image, "a prompt", 2**63 - 1, 99)
    assert not shows(image.resize((28, 2)), "a prompt", 2**63 - 1, 100)


def test_every_request_of_a_batch_gets_its_own_picture(device: Device) -> None:
    wanted = [("one", 0, 1), ("two", 2**63 - 1, 3), ("one", 7, 100), ("three", 7, 2)]
    results = device.results(*(device.parse(*each) for each in wanted))
    assert results[1].mean_batch_size > 1
    for result, each in zip(results, wanted, strict=True):
        assert shows(Image.open(io.BytesIO(result.image)), *each)


def test_forward_takes_time_per_batch_row(device: Device, sleeps: list[float]) -> None:
    device.results(device.parse("alone", 1, 2))
    assert sleeps == [STEP_S, STEP_S]
    sleeps.clear()
    guided = device.parse("guided", 2, 1, NEGATIVE_PROMPT="rain", TRUE_CFG_SCALE=2.0)
    device.results(guided, device.parse("plain", 3, 1))
    assert sleeps == [3 * STEP_S]


def test_image_is_cancelled_between_two_steps(device: Device) -> None:
    job = device.submit(device.parse("too long", 1, 100))
    device.turn(3)
    device.engine.cancel(job)
    assert isinstance(device.answer(job), Cancelled)
    assert [each.step for each in device.progress[job]][-1] < 10


def test_previews_are_images(device: Device) -> None:
    job = device.submit(device.parse("previewed", 1, 100))
    device.turn_until(lambda: any(each.preview for each in device.progress.get(job, [])))
    preview = next(each.preview for each in device.progress[job] if each.preview)
    assert Image.open(io.BytesIO(preview)).format == "JPEG"
    device.engine.cancel(job)
    device.answer(job)


def test_repository_is_the_real_one_except_for_the_engine(tmp_path: Path) -> None:
    rendered = render(tmp_path)
    differing = {}
    for path in filter(Path.is_file, rendered.models.rglob("*")):
        name = path.relative_to(rendered.models)
        original = (ROOT / "model_repository" / name).read_text().splitlines()
        copied = path.read_text().splitlines()
        assert len(copied) == len(original)
        if changed := [line for line, before in zip(copied, original, strict=True) if line != before]:
            differing[str(name)] = changed
    ((line,),) = differing.values()
    assert differing.keys() == {"flux/1/model.py"}
    assert SIMULATED_ENGINE in line
    assert (rendered.packages / "simulated" / "engine.py").is_file()


def test_renamed_engine_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "ENGINE", "genserve_backend.flux.other:build")
    with pytest.raises(ValueError, match="exactly once"):
        render(tmp_path)


def test_requests_of_a_load_differ() -> None:
    requests = draw_requests(200, steps=(1, 4))
    pictures = {expected_picture(each["prompt"], each["seed"], each["steps"]) for each in requests}
    assert len(pictures) == len({each["seed"] for each in requests}) == 200
    assert {each["steps"] for each in requests} == {1, 4}
    assert requests == draw_requests(200, steps=(1, 4))
