"""The FLUX comparison: load, contenders and verdict."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from compare import flux_contenders
from compare.flux import Result, broken_promises
from compare.flux_load import STEPS, Load, Request, Timing, drive
from random_flux import flux_transformer
from studies.flux_precision import adherence, points_lost, psnr, wide_transformer

PERF = Path(__file__).parents[2] / "perf"


def load(count: int = 12, concurrency: int = 4) -> Load:
    return Load.draw(count, concurrency, 64)


def test_load_is_reproducible_and_serializable() -> None:
    assert load(64) == load(64) == Load.from_json(load(64).to_json())
    assert {request.steps for request in load(64).requests} == set(STEPS)
    assert len({request.seed for request in load(64).requests}) == 64


def test_drive_keeps_the_concurrency_and_excludes_the_warm_up() -> None:
    lock = threading.Lock()
    in_flight: list[int] = [0]
    most: list[int] = [0]
    seen: list[int] = []

    def call(request: Request) -> None:
        with lock:
            in_flight[0] += 1
            most[0] = max(most[0], in_flight[0])
            seen.append(request.seed)
        time.sleep(0.01)
        with lock:
            in_flight[0] -= 1

    timing = drive(call, load(12, 4))
    assert most == [4]
    assert len(seen) == len(set(seen)) == 12 + 4
    assert timing.count == 12
    assert timing.seconds >= 12 / 4 * 0.01
    assert Timing.from_json(timing.to_json()) == timing


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Fake pipeline; returns the steps of each of its calls."""
    calls: list[list[int]] = []

    class Pipeline:
        def __init__(self, checkpoint: Any) -> None:
            pass

        def __call__(self, requests: Sequence[Request], size: int) -> list[bytes]:
            calls.append([request.steps for request in requests])
            time.sleep(0.02)
            return [str(request.seed).encode() for request in requests]

    monkeypatch.setattr(flux_contenders, "Pipeline", Pipeline)
    return calls


@pytest.mark.parametrize("name", ["lock", "pool"])
def test_lock_and_pool_make_one_image_per_call(name: str, batches: list[list[int]]) -> None:
    call = flux_contenders.CONTENDERS[name](None, load())  # type: ignore[arg-type]
    assert drive(call, load()).count == 12
    assert [len(batch) for batch in batches] == [1] * 16


def test_static_batches_have_equal_settings_only(batches: list[list[int]]) -> None:
    call = flux_contenders.static_batches(None, load())  # type: ignore[arg-type]
    assert drive(call, load(40, 16)).count == 40
    assert all(len(set(batch)) == 1 for batch in batches)
    assert max(map(len, batches)) > 1


def result(images_per_second: float, four_steps: float) -> Result:
    return Result([Timing(10 / images_per_second, {4: [four_steps] * 10})])


def test_broken_promises_name_ratio_and_contender() -> None:
    ours = result(10, 1.0)
    others = {"engine": result(10, 1), "lock": result(5, 9), "pool": result(5, 9), "static": result(8, 3.1)}
    assert broken_promises({"genserve": ours, **others}) == []
    others["pool"] = result(5.6, 9)
    others["static"] = result(8, 2.9)
    pool, latency = broken_promises({"genserve": ours, **others})
    assert pool.startswith("1.79 times (b)")
    assert "4-step" in latency


@pytest.mark.parametrize("name", ["static", "engine"])
def test_contender_script_prints_its_timing(name: str, tmp_path: Path) -> None:
    from random_flux import write_random_flux

    write_random_flux(tmp_path / "flux")
    (tmp_path / "load.json").write_text(Load((Request("a", 1, 1), Request("b", 2, 2)), 2, 64).to_json())
    command = [sys.executable, str(PERF / "compare" / "flux_contenders.py"), name, str(tmp_path / "flux")]
    ended = subprocess.run(
        [*command, str(tmp_path / "load.json")], capture_output=True, text=True, timeout=100, check=True
    )
    assert Timing.from_json(ended.stdout.strip().rpartition("\n")[2]).count == 2


def test_distance_and_loss_of_a_dtype() -> None:
    black = Image.new("RGB", (4, 4))
    assert psnr(black, black) == math.inf
    assert psnr(black, Image.new("RGB", (4, 4), (255, 255, 255))) == 0.0
    assert psnr(black, Image.new("RGB", (4, 4), (1, 1, 1))) == pytest.approx(48.13, abs=0.01)
    exact = {"shape": 0.9, "colour": 0.8, "everything": 0.7}
    assert points_lost(exact, {"shape": 0.88, "colour": 0.9, "everything": 0.7}) == pytest.approx(2.0)
    shares = adherence([Image.new("RGB", (64, 64), (255, 255, 255))] * 4)
    assert shares["number"] == shares["shape"] == shares["everything"] == 0.0


def test_wide_transformer_takes_the_inputs_of_the_demos() -> None:
    config = flux_transformer(guidance_embeds=True).config
    wide = wide_transformer(config, 256)
    assert (wide.inner_dim, wide.config.attention_head_dim) == (256, 128)
    assert wide.config.joint_attention_dim == config.joint_attention_dim
    assert len(wide.transformer_blocks) == config.num_layers
