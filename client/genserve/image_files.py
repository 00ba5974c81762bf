"""Image files: their encodings, and conversion that keeps the generation settings."""

from __future__ import annotations

import io
import json
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from genserve.errors import InvalidInput

PNG_KEY = "genserve"
EXIF_IMAGE_DESCRIPTION = 0x010E  # the EXIF tag that viewers show
MAX_METADATA_BYTES = 60_000
"""A JPEG segment and a JPEG 2000 comment hold little more than 65,500 bytes."""
PROMPTS = ("prompt", "negative_prompt")
PNG_LEVEL = 4
"""zlib level. The default of 6 takes 2.5 times as long for files that are 5 % smaller."""

WITH_EXIF = ("AVIF", "JPEG", "MPO", "TIFF", "WEBP")
WITH_TEXT = {"GIF": "comment", "JPEG2000": "comment", "PDF": "subject"}
"""Formats with another place for a text, each with Pillow's argument for it."""
QUALITY = {"AVIF": 95, "JPEG": 95, "MPO": 95, "WEBP": 95}
UNSUITABLE = {"BLP", "BUFR", "GRIB", "HDF5", "IM", "MSP", "PALM", "WMF", "XBM"}
"""Formats that Pillow writes only without colour, with a palette or with a program's own handler, or will drop."""


def checked_format(suffix: str) -> str | None:
    """Return Pillow's name of the format of files with a suffix, None without a suffix.

    Args:
        suffix: As ``.png``, in upper or lower case, or empty.

    Raises:
        InvalidInput: Pillow writes no images in colour with this suffix.
    """
    if not suffix:
        return None
    formats = _formats()
    if suffix.lower() not in formats:
        raise InvalidInput(f"the suffix is {suffix!r}; allowed: {', '.join(sorted(formats))}, or none")
    return formats[suffix.lower()]


def file_bytes(data: bytes, suffix: str) -> bytes:
    """Return the bytes of an image file with a suffix.

    Args:
        data: An encoded image.
        suffix: As ``.png``. Without one, or with one that fits the encoding, the bytes are those of `data`. Otherwise
            the image is converted, and the settings in its metadata are kept if the new format has a place for them.

    Raises:
        InvalidInput: Pillow writes no images in colour with this suffix.
    """
    target = checked_format(suffix)
    if target is None:
        return data
    image = Image.open(io.BytesIO(data))
    return data if image.format == target else _converted(image, target)


def _formats() -> dict[str, str]:
    """Return Pillow's formats for images in colour, by suffix."""
    known = Image.registered_extensions()  # loads every plugin
    return {suffix: name for suffix, name in known.items() if name in Image.SAVE and name not in UNSUITABLE}


def _converted(image: Image.Image, target: str) -> bytes:
    image.load()
    text = _settings(image)
    pixels = image.convert("RGB")
    pixels.info = {}  # Some formats would write the metadata of the old file too.
    options: dict[str, Any] = {"quality": QUALITY[target]} if target in QUALITY else {}
    if target == "PNG":
        options |= {"pnginfo": _png_info(text), "compress_level": PNG_LEVEL}
    elif text and target in WITH_EXIF:
        exif = Image.Exif()
        exif[EXIF_IMAGE_DESCRIPTION] = _short(text)
        options["exif"] = exif
    elif text and target in WITH_TEXT:
        options[WITH_TEXT[target]] = _short(text)
    buffer = io.BytesIO()
    pixels.save(buffer, target, **options)
    return buffer.getvalue()


def _settings(image: Image.Image) -> str:
    """Return the generation settings in an image's metadata, as JSON; empty if there are none."""
    return str(image.info.get(PNG_KEY) or image.getexif().get(EXIF_IMAGE_DESCRIPTION) or "")


def _png_info(text: str) -> PngInfo:
    info = PngInfo()
    if text:
        info.add_itxt(PNG_KEY, text)
    return info


def _short(text: str) -> str:
    """Return the settings without the prompts if they are too long for most formats, as the server does."""
    if len(text) <= MAX_METADATA_BYTES:
        return text
    return json.dumps({name: value for name, value in json.loads(text).items() if name not in PROMPTS})
