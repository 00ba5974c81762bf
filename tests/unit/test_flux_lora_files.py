"""Adapter files: where they are found, and which contents are refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_files
import pytest
import torch
from safetensors.torch import save

from genserve_backend.flux.lora.folder import AdapterError, Version, find, read_bytes
from genserve_backend.flux.lora.weights import LowRank, Shape, Weights, read_weights

LAYERS = {"a.to_q": Shape(8, 8), "a.to_k": Shape(8, 8), "a.proj_out": Shape(8, 4), "proj_out": Shape(8, 4)}
TEXT = {"encoder.layers.0.self_attn.q_proj": Shape(6, 6)}
Q = "transformer.a.to_q"


def good() -> lora_files.Tensors:
    return lora_files.diffusers_keys({"a.to_q": LAYERS["a.to_q"]}, 2)


def read(tensors: lora_files.Tensors, *, dtype: torch.dtype = torch.float32) -> Weights:
    data = save({key: tensor.contiguous() for key, tensor in tensors.items()})
    return read_weights(data, {"transformer": LAYERS, "text_encoder": TEXT}, max_rank=16, dtype=dtype)


def refusal(tensors: lora_files.Tensors, **options: Any) -> str:
    with pytest.raises(AdapterError) as caught:
        read(tensors, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", ["file", "folder", "inner-link", "folder-link"])
def test_adapter_is_found(name: str, tmp_path: Path) -> None:
    lora_files.write(tmp_path, "file", good())
    lora_files.write_folder(tmp_path, "folder", good())
    (tmp_path / "inner-link.safetensors").symlink_to("file.safetensors")
    (tmp_path / "folder-link").symlink_to("folder")
    file = find(tmp_path, name)
    assert file.path.is_file()
    assert len(read_bytes(file, max_bytes=10_000)) == file.version.size


def test_linked_folder_of_adapters_is_used(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    lora_files.write(tmp_path / "real", "file", good())
    (tmp_path / "link").symlink_to("real")
    assert find(tmp_path / "link", "file").path == tmp_path / "real" / "file.safetensors"


def bad_entries(folder: Path, outside: Path) -> None:
    lora_files.write(outside, "secret", good())
    (folder / "outer-link.safetensors").symlink_to(outside / "secret.safetensors")
    (folder / "outer-folder").symlink_to(outside)
    (outside / "pytorch_lora_weights.safetensors").write_bytes(b"secret")
    (folder / "circle.safetensors").symlink_to("circle.safetensors")
    (folder / "directory.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")


@pytest.mark.parametrize("name", ["unknown", "outer-link", "outer-folder", "circle", "directory", "pipe", "x" * 200])
def test_other_entries_are_no_adapters(name: str, tmp_path: Path) -> None:
    folder, outside = tmp_path / "loras", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    bad_entries(folder, outside)
    with pytest.raises(AdapterError, match="no adapter of this name|cannot be read"):
        find(folder, name)


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="folder of adapters cannot be read"):
        find(tmp_path / "missing", "neon")


def test_large_files_are_not_read(tmp_path: Path) -> None:
    lora_files.write(tmp_path, "file", good())
    with pytest.raises(AdapterError, match=r"has [\d,]+ bytes; allowed: at most 100"):
        read_bytes(find(tmp_path, "file"), max_bytes=100)


@pytest.mark.parametrize("change", [b"", b"longer" * 1_000], ids=["shorter", "longer"])
def test_file_that_changes_is_not_used(change: bytes, tmp_path: Path) -> None:
    path = lora_files.write(tmp_path, "file", good())
    file = find(tmp_path, "file")
    path.write_bytes(change)
    with pytest.raises(AdapterError, match="changed while it was read"):
        read_bytes(file, max_bytes=100_000)
    assert find(tmp_path, "file").version != file.version


def test_version_is_that_of_the_contents(tmp_path: Path) -> None:
    path = lora_files.write(tmp_path, "file", good())
    assert find(tmp_path, "file").version == Version.of(path.stat())


def test_products_are_transposed_and_scaled() -> None:
    tensors = good() | {f"{Q}.alpha": torch.tensor(1.0)}
    low_rank = read(tensors)["transformer"]["a.to_q"]
    assert isinstance(low_rank, LowRank)
    assert torch.equal(low_rank.down, tensors[f"{Q}.lora_A.weight"].T)
    assert torch.allclose(low_rank.up, tensors[f"{Q}.lora_B.weight"].T / 2)
    assert low_rank.rank == 2


def test_clip_of_older_transformers_has_another_level_of_names() -> None:
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.randn(2, 6), f"{name}.lora_B.weight": torch.randn(6, 2)}
    assert list(read(good() | tensors)["text_encoder"]) == list(TEXT)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00" * 7, b"\xff" * 64, b"not safetensors", save(good())[:-1], save(good()) + b"x", b"\x80\x04K\x01."],
    ids=["empty", "short", "huge-header", "text", "truncated", "longer", "pickle"],
)
def test_damaged_files_are_refused(data: bytes) -> None:
    with pytest.raises(AdapterError, match="damaged"):
        read_weights(data, {"transformer": LAYERS}, max_rank=16, dtype=torch.float32)


def change(key: str, make: Callable[[torch.Tensor], torch.Tensor]) -> lora_files.Tensors:
    tensors = good()
    return tensors | {key: make(tensors[key])}


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0, 0] = float("nan")
    return tensor


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({}, "no low-rank products"),
        ({f"{Q}.lora_A.weight": torch.randn(2, 8)}, "lacks one of two factors"),
        (lora_files.diffusers_keys({"b.to_q": Shape(8, 8)}, 2), "its layer b.to_q is not in the model's transformer"),
        (good() | lora_files.diffusers_keys({"x": Shape(8, 8)}, 2), "its layer x is not in"),
        (lora_files.diffusers_keys({"a.to_q": Shape(9, 8)}, 2), r"\(2, 9\) and \(8, 2\); allowed: \(rank, 8\)"),
        (lora_files.diffusers_keys({"a.to_q": Shape(8, 7)}, 2), r"have the shapes"),
        (lora_files.diffusers_keys({"a.to_q": Shape(7, 8)}, 2), r"have the shapes"),
        (lora_files.diffusers_keys({"a.to_q": Shape(8, 8)}, 17), "has rank 17; allowed: at most 16"),
        (change(f"{Q}.lora_A.weight", lambda down: down[:1]), "have the shapes"),
        (change(f"{Q}.lora_A.weight", lambda down: down[:0]), "have the shapes"),
        (change(f"{Q}.lora_A.weight", lambda down: down[..., None, None]), "have the shapes"),
        (change(f"{Q}.lora_A.weight", torch.flatten), "have the shapes"),
        (change(f"{Q}.lora_B.weight", with_nan), "lora_B.weight is not finite"),
        (change(f"{Q}.lora_A.weight", lambda down: down / 0), "lora_A.weight is not finite"),
        (change(f"{Q}.lora_A.weight", lambda down: down.to(torch.int8)), "has the dtype int8"),
        (change(f"{Q}.lora_A.weight", lambda down: down.to(torch.float8_e4m3fn)), "has the dtype float8_e4m3fn"),
        (good() | {f"{Q}.alpha": torch.tensor(-1.0)}, "alpha is no number from 0 on"),
        (good() | {f"{Q}.alpha": torch.ones(2)}, "alpha is no number from 0 on"),
        (good() | {f"{Q}.alpha": torch.tensor(float("nan"))}, "alpha is not finite"),
        (good() | {f"{Q}.lora_magnitude_vector": torch.ones(8)}, "DoRA, which is not supported"),
        (good() | {f"{Q}.dora_scale": torch.ones(8)}, "DoRA, which is not supported"),
        (good() | {f"{Q}.lora_B.bias": torch.ones(8)}, "changed biases, which is not supported"),
        (good() | {"transformer.a.norm_q.weight": torch.ones(8)}, "changed norms, which is not supported"),
        ({f"{Q}.lokr_w1": torch.ones(2, 2)}, "LoKr, which is not supported"),
        ({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, "LoHa, which is not supported"),
        (good() | {"text_encoder_2.x.lora_A.weight": torch.ones(2, 2)}, "does not adapt"),
        (good() | {"unet.x.lora_A.weight": torch.ones(2, 2)}, "belongs to no part"),
        ({f"lora_unet_unknown_0.lora_{way}.weight": torch.ones(2, 2) for way in ("down", "up")}, "cannot convert"),
        ({f"other_0.lora_{way}.weight": torch.ones(2, 2) for way in ("down", "up")}, "unknown format"),
        ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(2, 2)}, "cannot convert"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_unusable_contents_are_refused(tensors: lora_files.Tensors, reason: str) -> None:
    with pytest.raises(AdapterError, match=reason) as caught:
        read(tensors)
    assert len(str(caught.value)) < 300


def test_zeros_of_unsupported_kinds_are_ignored() -> None:
    zeros = {f"{Q}.lora_B.bias": torch.zeros(8), "text_encoder_2.x.lora_A.weight": torch.zeros(2, 2)}
    assert list(read(good() | zeros)) == ["transformer"]


def test_weights_beyond_the_dtype_are_refused() -> None:
    large = {key: tensor * 1e5 for key, tensor in good().items()}
    assert "not finite as float16" in refusal(large, dtype=torch.float16)
    assert read(large, dtype=torch.bfloat16)["transformer"]["a.to_q"].up.dtype == torch.bfloat16


def test_kohya_scale_below_zero_ends_no_loop() -> None:
    layer = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {f"{layer}.lora_down.weight": torch.ones(2, 8), f"{layer}.lora_up.weight": torch.ones(8, 2)}
    assert "no number from 0 on" in refusal(tensors | {f"{layer}.alpha": torch.tensor(-2.0)})


def with_metadata(folder: Path, metadata: Any) -> Weights:
    layers = {name: LAYERS[name] for name in ("a.to_q", "a.proj_out", "proj_out")}
    path = lora_files.write(folder, "metadata", lora_files.diffusers_keys(layers, 2), metadata)
    return read_weights(path.read_bytes(), {"transformer": LAYERS}, max_rank=16, dtype=torch.float32)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ([], "metadata of its file are damaged"),
        ({"transformer.r": 4}, "has rank 2, but its metadata say 4"),
        ({"transformer.r": 2, "transformer.lora_alpha": "x"}, "have the alpha x"),
        ({"transformer.r": 2, "transformer.lora_alpha": float("nan")}, "have the alpha nan"),
        ({"transformer.r": 2, "transformer.use_dora": True}, "use_dora, which is not supported"),
        ({"transformer.r": 2, "transformer.bias": "all"}, "biases"),
        ({"transformer.r": 2, "transformer.rank_pattern": {"(a+)+b": 3}}, "rank_pattern that is not supported"),
        ({"transformer.r": 2, "transformer.alpha_pattern": [1]}, "alpha_pattern that is not supported"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_unusable_metadata_are_refused(metadata: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=reason):
        with_metadata(tmp_path, metadata)


def test_metadata_set_the_scale_by_layer(tmp_path: Path) -> None:
    pattern = {"^proj_out": 8, "proj_out": 2}
    metadata = {"transformer.r": 2, "transformer.lora_alpha": 6, "transformer.alpha_pattern": pattern}
    weights, plain = (with_metadata(tmp_path, each)["transformer"] for each in (metadata, None))
    scales = {name: (weights[name].up / plain[name].up).mean().item() for name in weights}
    assert scales == pytest.approx({"a.to_q": 3.0, "a.proj_out": 1.0, "proj_out": 4.0})
