"""Headers of safetensors files and their indexes: complete, damaged and hostile ones."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from genserve.serve import weights as weights_module
from genserve.serve.weights import DamagedFile, Tensor, read_header, read_weights

TENSORS = {
    "half": torch.zeros(3, 5, dtype=torch.bfloat16),
    "full": torch.zeros(7),
    "ids": torch.zeros(2, dtype=torch.int64),
    "scalar": torch.tensor(1.0),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def header(tensors: Any, data: int = 0) -> bytes:
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def entry(*, dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"t": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


def test_header_has_dtypes_and_sizes(file: Path) -> None:
    assert read_header(file) == {
        "half": Tensor("BF16", 15, "half"),
        "full": Tensor("F32", 7, "full"),
        "ids": Tensor("I64", 2, "ids"),
        "scalar": Tensor("F32", 1, "scalar"),
    }


def test_loaded_size_follows_the_dtype_except_for_integers(file: Path) -> None:
    weights = read_weights(file.parent, "model", index_first=False)
    floats, integers = 15 + 7 + 1, 2 * 8
    assert weights.loaded_bytes("float32") == floats * 4 + integers
    assert weights.loaded_bytes("bfloat16") == weights.loaded_bytes("float16") == floats * 2 + integers
    assert (weights.files, weights.problems) == (1, [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged (0 bytes): header too small"),
        (b"\0\0\0", "is damaged (3 bytes): header too small"),
        (struct.pack("<Q", 2**63) + b"{}", "header too large"),
        (struct.pack("<Q", 50_000_000) + b"{}", "invalid header length"),
        (header(b"{not json}"), "invalid JSON in header"),
        (header(b"[]"), "is damaged"),
        (header(b"\xff\xfe{}"), "is damaged"),
        (header(b"[" * 10_000), "is damaged"),
        (header(entry(), 8)[:-1], "its length does not match its header, as after an interrupted download"),
        (header(entry(), 9), "its length does not match its header"),
        (header(entry(offsets=(4, 12)), 12), "invalid offset"),
        (header(entry(offsets=(8, 0)), 8), "is damaged"),
        (header(entry(shape=(3,)), 8), "invalid shape, data type, or offset"),
        (header(entry(shape=(2**40, 2**40)), 8), "overflow"),
        (header(entry(shape=(-2,)), 8), "is damaged"),
        (header(entry(dtype="F33"), 8), "is damaged"),
        (header({"t": None}), "is damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "is a Git LFS pointer"),
        (b"\x80\x04PK not weights at all", "is damaged"),
    ],
    ids=lambda value: None if isinstance(value, str) else value[:20].hex(),
)
def test_damaged_file_is_named_with_the_reason(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(DamagedFile) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path} ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 300


def make_folder(path: Path) -> None:
    path.mkdir()


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_broken_link(path: Path) -> None:
    path.symlink_to("nowhere")


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "is missing"),
        (make_folder, "is a folder"),
        (make_fifo, "is no regular file"),
        (make_broken_link, "is a broken link"),
        (make_loop, "cannot be read: Too many levels of symbolic links"),
    ],
    ids=["missing", "folder", "fifo", "broken-link", "loop"],
)
def test_anything_but_a_file_is_named(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(DamagedFile) as caught:
        read_header(path)
    assert str(caught.value) == f"{path} {message}"
    assert read_weights(tmp_path, "model", index_first=False).problems == [str(caught.value)]


def test_file_without_permission_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(weights_module, "safe_open", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DamagedFile, match="cannot be read: Permission denied"):
        read_header(file)


def test_random_damage_never_raises_anything_else(file: Path, tmp_path: Path) -> None:
    """The header is damaged more often than the data, which have no check."""
    whole = file.read_bytes()
    length = 8 + struct.unpack("<Q", whole[:8])[0]
    chance = random.Random(5)
    damaged = tmp_path / "damaged.safetensors"
    messages = []
    for _ in range(2_000):
        content = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(min(length, len(content)))
            match chance.randrange(4):
                case 0:
                    content[place] = chance.randrange(256)
                case 1:
                    del content[place : place + chance.randint(1, 20)]
                case 2:
                    content[place:place] = chance.choice([b"-1", b"null", b"[]", b"1e999", b'"\\ud800"', b"\0", b"{"])
                case 3:
                    del content[max(1, place) :]
        damaged.write_bytes(content)
        try:
            read_header(damaged)
        except DamagedFile as error:
            messages.append(str(error))
    assert len(messages) > 1_000
    assert [message for message in messages if not message.startswith(f"{damaged} ")] == []


# Indexes.


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder with two files and their index."""
    save_file({"a": torch.zeros(2), "b": torch.zeros(3)}, tmp_path / "model-1.safetensors")
    save_file({"c": torch.zeros(5)}, tmp_path / "model-2.safetensors")
    write_index(tmp_path, {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"})
    return tmp_path


def write_index(folder: Path, weight_map: Any) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def problems(folder: Path, *, index_first: bool = False) -> list[str]:
    return read_weights(folder, "model", index_first=index_first).problems


def test_all_files_of_an_index_are_read(sharded: Path) -> None:
    weights = read_weights(sharded, "model", index_first=False)
    assert (weights.files, weights.loaded_bytes("float32"), weights.problems) == (2, 40, [])


def test_missing_and_damaged_files_of_an_index_are_all_named(sharded: Path) -> None:
    (sharded / "model-1.safetensors").unlink()
    with (sharded / "model-2.safetensors").open("r+b") as file:
        file.truncate(60)
    first, second = problems(sharded)
    assert first == f"{sharded / 'model-1.safetensors'} is missing"
    assert second.startswith(f"{sharded / 'model-2.safetensors'} is damaged (60 bytes)")


def test_missing_tensors_of_an_index_are_named(sharded: Path) -> None:
    where = dict.fromkeys(("c", "d", "e"), "model-2.safetensors")
    write_index(sharded, {"a": "model-1.safetensors", "b": "model-1.safetensors", **where})
    assert problems(sharded) == [
        f"{sharded / 'model-2.safetensors'} lacks 2 of 3 tensors of model.safetensors.index.json, d for one"
    ]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "it has no weight_map"),
        ({}, "it has no weight_map"),
        (["a"], "it has no weight_map"),
        ({"a": 1}, "names 1 as a file of weights"),
        ({"a": ""}, "names  as a file of weights"),
        ({"a": "../x.safetensors"}, "names ../x.safetensors as a file"),
        ({"a": "/etc/passwd"}, "names /etc/passwd as a file"),
        ({"a": "x\0y"}, "is no path"),
        ({"a": "\ud800"}, "is no path"),
        ({"a": "x" * 300}, "cannot be read: File name too long"),
    ],
    ids=str,
)
def test_index_with_wrong_content_is_named(weight_map: Any, message: str, tmp_path: Path) -> None:
    write_index(tmp_path, weight_map)
    (problem,) = problems(tmp_path)
    assert message in problem


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000], ids=lambda content: content[:2].hex())
def test_index_that_is_no_json_object_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    (problem,) = problems(tmp_path)
    assert problem.startswith(str(tmp_path / "model.safetensors.index.json"))


def test_loader_chooses_between_a_file_and_an_index(sharded: Path) -> None:
    """transformers prefers the file, diffusers the index."""
    (sharded / "model.safetensors").write_bytes(b"damaged")
    assert problems(sharded, index_first=True) == []
    (problem,) = problems(sharded, index_first=False)
    assert "model.safetensors is damaged" in problem
