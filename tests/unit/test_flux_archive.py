"""The image archive: its folder, and file names from task ids."""

from __future__ import annotations

import tempfile
from itertools import combinations
from pathlib import Path

import pytest

from genserve_backend.flux.archive import ImageArchive, file_name
from genserve_backend.settings import FluxSettings, SettingsError, load

HOSTILE = {
    "up": "../../etc/passwd",
    "below": "a/b",
    "absolute": "/etc/passwd",
    "backslash": "a\\b",
    "empty": "",
    "here": ".",
    "parent": "..",
    "dots": "...",
    "hidden": ".profile",
    "null": "\x00",
    "null-inside": "a\x00b",
    "newline": "a\nb",
    "blank": " ",
    "long": "x" * 1_000,
    "longer": "x" * 1_001,
    "long-dots": "." * 1_000,
    "accent": "caf\u00e9",
    "chinese": "\u732b" * 300,
    "emoji": "\U0001f600",
    "surrogate": "\udc80",
    "percent": "%2e%2e%2f",
    "glob": "*?~$(id)",
}


@pytest.mark.parametrize(
    "task_id",
    ["a", "task-1", "0b5ff1c0a8f44e6d9d2f4f0a1b2c3d4e", "Run_7.image.2", "a..b", "x" * 100, "-rf"],
    ids=lambda value: value[:10],
)
def test_plain_id_is_the_file_name(task_id: str, tmp_path: Path) -> None:
    assert file_name(task_id) == task_id
    ImageArchive(tmp_path).save(task_id, b"data", "png")
    assert (tmp_path / f"{task_id}.png").read_bytes() == b"data"


@pytest.mark.parametrize("task_id", HOSTILE.values(), ids=HOSTILE)
def test_hostile_id_cannot_leave_the_folder(task_id: str, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "kept"
    ImageArchive(folder).save(task_id, b"data", "png")
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert path.parent == folder
    assert path.read_bytes() == b"data"
    assert path.name.endswith(".png")
    assert path.name.isascii()
    assert path.name.isprintable()
    assert not file_name(task_id).startswith(".")


def test_different_ids_have_different_names() -> None:
    ids = [*HOSTILE.values(), "a_b", "a-b", "a:b", "a b", "a.", ".a", "a", "_", "x" * 100, "x" * 99 + "/", "etc/passwd"]
    assert len(set(ids)) == len(ids)
    assert not [pair for pair in combinations(ids, 2) if file_name(pair[0]) == file_name(pair[1])]


def test_images_are_saved_unchanged_in_every_format(tmp_path: Path) -> None:
    archive = ImageArchive(tmp_path / "kept")
    for extension in ("png", "jpeg", "webp"):
        archive.save("task", extension.encode() + b"\x00\xff\r\n", extension)
    files = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    assert files == {f"task.{name}": name.encode() + b"\x00\xff\r\n" for name in ("png", "jpeg", "webp")}


def test_last_image_of_an_id_wins(tmp_path: Path) -> None:
    archive = ImageArchive(tmp_path)
    archive.save("task", b"a longer first image", "png")
    archive.save("task", b"second", "png")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"second"]


def test_archive_without_a_folder_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ImageArchive(None).save("task", b"data", "png")
    assert list(tmp_path.iterdir()) == []


def test_write_failure_is_only_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"in the way")
    ImageArchive(tmp_path / "file" / "kept").save("task", b"data", "png")
    ImageArchive(tmp_path / "file").save("task", b"data", "png")
    (tmp_path / "task.png").mkdir()
    ImageArchive(tmp_path).save("task", b"data", "png")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert all(vars(record)["fields"]["task_id"] == "task" for record in caplog.records)
    assert (tmp_path / "file").read_bytes() == b"in the way"


def setting(value: str | None) -> Path | None:
    environ = {} if value is None else {"SAVE_TEST_IMAGES": value}
    return load(FluxSettings, {"model_path": "flux"}, repository=Path("/models"), environ=environ).save_test_images


@pytest.mark.parametrize("value", [None, "", "false", "False", "FALSE", "0", "no", "off"])
def test_archive_is_off_by_default(value: str | None) -> None:
    assert setting(value) is None


@pytest.mark.parametrize("value", ["true", "True", "TRUE", "1", "yes", "on"])
def test_true_selects_a_temporary_folder(value: str) -> None:
    folder = setting(value)
    assert folder is not None
    assert folder.parent == Path(tempfile.gettempdir())


@pytest.mark.parametrize("value", ["/data/images", "/", "/with space/\u732b"])
def test_absolute_path_is_the_folder(value: str) -> None:
    assert setting(value) == Path(value)


@pytest.mark.parametrize("value", ["images", "./images", "../images", "~/images", "ture", "2", " "])
def test_other_values_are_rejected(value: str) -> None:
    with pytest.raises(SettingsError, match="^SAVE_TEST_IMAGES: .*true, false or an absolute path"):
        setting(value)


def test_folder_can_be_a_model_parameter() -> None:
    parameters = {"model_path": "flux", "save_test_images": "/data/images"}
    assert load(FluxSettings, parameters, repository=Path("/models"), environ={}).save_test_images == Path(
        "/data/images"
    )
