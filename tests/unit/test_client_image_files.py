"""Files of generated images: encodings, conversion and metadata."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PdfParser import PdfParser

from genserve import GeneratedImage, InvalidInput
from genserve.image_files import checked_format, file_bytes
from genserve_backend.flux.image_file import embedded_settings, encode

SETTINGS = {"seed": 7, "steps": 4}
PIXELS = np.random.default_rng(7).integers(0, 256, (48, 80, 3), dtype=np.uint8)
FORMATS = ("png", "jpeg", "webp")


@dataclass
class Request:
    """The part of a server's request that its encoder reads."""

    format: str
    prompt: str = "a \u2603 \U0001f40b"
    negative_prompt: str = "rain"


def generated(image_format: str, **prompts: str) -> GeneratedImage:
    """Return an image as the server encodes it."""
    request: Any = Request(image_format, **prompts)
    return GeneratedImage(encode(Image.fromarray(PIXELS), request, SETTINGS), 7, dict(SETTINGS))


def kept(prompt: str = Request.prompt) -> dict[str, Any]:
    return {"prompt": prompt, "negative_prompt": Request.negative_prompt, **SETTINGS}


@pytest.mark.parametrize(
    ("image_format", "names"),
    [
        ("png", ["x", "x.png", "x.PNG"]),
        ("jpeg", ["x", "x.jpg", "x.jpeg", "x.JPG"]),
        ("webp", ["x", "x.webp", ".hidden"]),
    ],
    ids=FORMATS,
)
def test_fitting_or_missing_suffix_keeps_the_file_as_it_is(image_format: str, names: list[str], tmp_path: Path) -> None:
    image = generated(image_format)
    for name in names:
        image.save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == image.data


def test_path_may_be_text(tmp_path: Path) -> None:
    generated("png").save(str(tmp_path / "x.png"))
    assert Image.open(tmp_path / "x.png").size == (80, 48)


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.png", "PNG"),
        ("x.jpg", "JPEG"),
        ("x.JPEG", "JPEG"),
        ("x.webp", "WEBP"),
        ("x.avif", "AVIF"),
        ("x.tiff", "TIFF"),
    ],
)
def test_conversion_keeps_settings_where_the_server_puts_them(
    name: str, kind: str, image_format: str, tmp_path: Path
) -> None:
    generated(image_format).save(tmp_path / name)
    converted = Image.open(tmp_path / name)
    assert (converted.format, converted.size) == (kind, (80, 48))
    assert embedded_settings(converted) == kept()


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("suffix", [".gif", ".jp2"])
def test_conversion_keeps_settings_as_a_comment(suffix: str, image_format: str, tmp_path: Path) -> None:
    generated(image_format).save(tmp_path / f"x{suffix}")
    assert json.loads(Image.open(tmp_path / f"x{suffix}").info["comment"]) == kept()


def test_conversion_to_pdf_keeps_settings_as_the_subject(tmp_path: Path) -> None:
    generated("png").save(tmp_path / "x.pdf")
    with PdfParser(str(tmp_path / "x.pdf")) as pdf:
        assert json.loads(pdf.info.Subject) == kept()


def test_lossless_conversion_keeps_the_pixels(tmp_path: Path) -> None:
    jpeg = generated("jpeg")
    for name in ("x.png", "x.bmp", "x.tif"):
        jpeg.save(tmp_path / name)
        assert np.array_equal(Image.open(tmp_path / name), jpeg)
    assert not np.array_equal(jpeg, PIXELS)
    assert np.array_equal(generated("png"), PIXELS)


def test_lossy_conversion_is_of_high_quality(tmp_path: Path) -> None:
    smooth = np.tile(np.arange(80, dtype=np.uint8)[None, :, None] * 3, (48, 1, 3))
    buffer = io.BytesIO()
    Image.fromarray(smooth).save(buffer, "PNG")
    for suffix in (".jpg", ".webp", ".avif"):
        lossy = np.asarray(Image.open(io.BytesIO(file_bytes(buffer.getvalue(), suffix))), dtype=int)
        assert np.abs(lossy - smooth).max() <= 8


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".bmp", ".pdf"])
def test_image_without_settings_is_converted(suffix: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "WEBP")
    assert file_bytes(buffer.getvalue(), suffix)


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".jp2"])
def test_prompts_too_long_for_the_format_are_left_out(suffix: str) -> None:
    long = generated("png", prompt="\U0001f40b" * 10_000)
    converted = Image.open(io.BytesIO(file_bytes(long.data, suffix)))
    assert json.loads(converted.info.get("comment") or json.dumps(embedded_settings(converted))) == SETTINGS


def test_long_prompts_stay_in_a_png() -> None:
    long = "a" * 10_000
    webp = generated("webp", prompt=long)
    assert embedded_settings(Image.open(io.BytesIO(file_bytes(webp.data, ".png")))) == kept(long)


@pytest.mark.parametrize("suffix", [".xyz", ".v2", ".xbm", ".psd", ".h5"])
def test_unknown_suffix_is_rejected_with_the_allowed_ones(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=rf"suffix is '\{suffix}'; allowed: .*\.jpg.*\.png.*\.webp, or none"):
        generated("png").save(tmp_path / f"x{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_every_allowed_suffix_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as rejected:
        checked_format(".xyz")
    allowed = str(rejected.value).partition("allowed: ")[2].removesuffix(", or none").split(", ")
    assert len(allowed) > 20
    image = generated("png")
    for suffix in allowed:
        assert file_bytes(image.data, suffix), suffix


def test_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        generated("png").save(tmp_path / "none" / "x.png")


@pytest.mark.parametrize("image_format", FORMATS)
def test_notebooks_get_a_png(image_format: str) -> None:
    image = generated(image_format)
    shown = Image.open(io.BytesIO(image._repr_png_()))
    assert shown.format == "PNG"
    assert np.array_equal(shown, image)
    assert embedded_settings(shown) == kept()
    assert (image._repr_png_() == image.data) == (image_format == "png")


def test_array_has_the_pixels() -> None:
    image = generated("png")
    array = np.asarray(image)
    assert (array.shape, array.dtype) == ((48, 80, 3), np.uint8)
    assert np.array_equal(array, PIXELS)
    array[:] = 0  # a new array each time
    assert np.array_equal(np.array(image, copy=True), PIXELS)
    assert np.asarray(image, dtype=np.float32).dtype == np.float32
    assert image.__array__(np.dtype(np.int16)).dtype == np.int16  # NumPy 1 passes nothing else
    with pytest.raises(ValueError, match="allowed: copy=None or True"):
        image.__array__(copy=False)


def test_array_has_three_channels_whatever_the_file() -> None:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[:, :, 0]).save(buffer, "PNG")
    assert np.asarray(GeneratedImage(buffer.getvalue(), 7, {})).shape == (48, 80, 3)
