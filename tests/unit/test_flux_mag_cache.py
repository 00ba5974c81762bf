"""MagCache's decisions against those of diffusers' hook."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.hooks.hooks import StateManager
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS, MagCacheConfig, MagCacheHeadHook, MagCacheState
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

from genserve_backend.checkpoints import CheckpointError
from genserve_backend.flux.build import choose_step_cache
from genserve_backend.flux.calibrate import main as calibrate
from genserve_backend.flux.checkpoint import MAG_RATIOS_FILE, FluxCheckpoint
from genserve_backend.flux.mag_cache import MAX_SKIPPED, RETENTION, plan_skips
from genserve_backend.flux.step_cache import FirstBlockCache, MagCache, NoCache
from random_flux import write_random_flux

RATIOS = FLUX_MAG_RATIOS.tolist()
SHORT = [1.0, 1.3, 0.97, 1.02, 0.99, 1.01, 0.98]


def diffusers_skips(ratios: list[float], steps: int, threshold: float) -> tuple[bool, ...]:
    """Ask diffusers' hook at each step, with blocks that do nothing."""
    config = MagCacheConfig(threshold=threshold, num_inference_steps=steps, mag_ratios=ratios)
    hook = MagCacheHeadHook(StateManager(MagCacheState), config)
    hook._metadata = TransformerBlockRegistry.get(FluxTransformerBlock)
    nothing = torch.zeros(1, 1, 1)
    hook.fn_ref = SimpleNamespace(original_forward=lambda **_: (nothing, nothing))
    skips = []
    for step in range(steps):
        hook.new_forward(None, hidden_states=nothing, encoder_hidden_states=nothing)
        state: Any = hook.state_manager.get_state()
        skips.append(not state.should_compute)
        # The tail's hook does this.
        state.previous_residual, state.step_index = nothing, step + 1
    return tuple(skips)


@pytest.mark.parametrize("ratios", [RATIOS, SHORT, [1.0], [1.0] * 4], ids=["dev", "short", "one", "four"])
@pytest.mark.parametrize("threshold", [1e-6, 0.03, 0.06, 0.12, 0.24, 0.5, 1.0])
def test_same_steps_are_skipped_as_by_diffusers(ratios: list[float], threshold: float) -> None:
    for steps in range(1, 101):
        assert plan_skips(ratios, steps, threshold) == diffusers_skips(ratios, steps, threshold), steps


def test_more_is_skipped_with_a_higher_threshold() -> None:
    skipped = [sum(plan_skips(RATIOS, 28, threshold)) for threshold in (0.0, 0.03, 0.06, 0.12, 0.24)]
    assert skipped == sorted(skipped)
    assert skipped[1:3] + skipped[4:] == [11, 14, 17]  # docs/operating.md names them


@pytest.mark.parametrize("steps", [1, 2, 4, 28, 100])
def test_start_is_computed_and_skips_in_a_row_are_bounded(steps: int) -> None:
    skips = plan_skips([1.0], steps, 1.0)
    assert not any(skips[: max(1, int(RETENTION * steps))])
    runs = "".join("s" if skip else "c" for skip in skips).split("c")
    assert max(map(len, runs)) <= MAX_SKIPPED


@pytest.fixture(scope="module", params=["dev", "schnell"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / request.param
    write_random_flux(path, schnell=request.param == "schnell")
    return path


def test_dev_has_ratios_and_schnell_has_none(folder: Path) -> None:
    checkpoint = FluxCheckpoint.load(folder)
    assert checkpoint.has_mag_ratios == (folder.name == "dev")
    assert isinstance(choose_step_cache(checkpoint, "magcache"), MagCache if folder.name == "dev" else NoCache)
    assert isinstance(choose_step_cache(checkpoint, "first-block"), FirstBlockCache)


def test_calibration_writes_ratios_that_the_checkpoint_then_has(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "ratios.json"
    asked = ["--prompt", "a boat", "--prompt", "the sea", "--steps", "5", "--size", "64", "--output", str(output)]
    assert calibrate([str(folder), *asked]) == 0
    written = json.loads(output.read_text())
    assert (written["steps"], written["prompts"]) == (5, ["a boat", "the sea"])
    assert len(written["ratios"]) == 5
    assert written["ratios"][0] == 1.0
    assert len(set(written["ratios"])) > 1
    kept = folder / MAG_RATIOS_FILE
    try:
        kept.write_text(output.read_text())
        checkpoint = FluxCheckpoint.load(folder)
    finally:
        kept.unlink()
    assert checkpoint.mag_ratios == tuple(written["ratios"])
    assert checkpoint.has_mag_ratios
    assert isinstance(choose_step_cache(checkpoint, "magcache"), MagCache)


def test_calibration_equals_diffusers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import FluxPipeline

    path = tmp_path / "dev"
    write_random_flux(path)
    checkpoint = FluxCheckpoint.load(path)
    plain = FluxPipeline.from_pretrained(path, dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    plain.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=6))
    plain(
        "a boat",
        num_inference_steps=6,
        height=64,
        width=64,
        max_sequence_length=checkpoint.max_sequence_length,
        generator=torch.Generator("cpu").manual_seed(0),
    )
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[1.0")]
    assert calibrate([str(path), "--prompt", "a boat", "--steps", "6", "--size", "64"]) == 0
    found = FluxCheckpoint.load(path).mag_ratios
    assert found == pytest.approx(json.loads(line), abs=2e-4)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"ratios": []}',
        '{"ratios": [1, "2"]}',
        '{"ratios": [1, -1]}',
        '{"ratios": [NaN]}',
        '{"ratios": 1}',
        '{"ratios": [1, true]}',
        '{"ratios": [1e999]}',
        '{"ratios": {"0": 1}}',
    ],
)
def test_damaged_ratios_are_named(folder: Path, content: str) -> None:
    path = folder / MAG_RATIOS_FILE
    path.write_text(content)
    try:
        with pytest.raises(CheckpointError, match=MAG_RATIOS_FILE):
            FluxCheckpoint.load(folder)
    finally:
        path.unlink()


def test_calibration_of_a_missing_checkpoint_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert calibrate([str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
