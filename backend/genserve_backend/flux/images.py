"""Encoding images, with the settings that made them in their metadata."""

from __future__ import annotations

import io
import json
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from genserve_backend.flux.request import FluxRequest

PNG_KEY = "genserve"
EXIF_IMAGE_DESCRIPTION = 0x010E  # the EXIF tag that viewers show
MAX_EXIF_BYTES = 60_000
"""A JPEG segment holds at most 65,533 bytes."""
QUALITY = 95
PNG_LEVEL = 4
"""zlib's; its default of 6 takes 2.5 times as long for files that are 5 % smaller."""


def encode(image: Image.Image, request: FluxRequest, settings: dict[str, Any]) -> bytes:
    """The image file: as PNG an ``iTXt`` chunk, else the EXIF image description holds the settings as JSON.

    The bytes depend on the arguments alone, so the same request gives the same file.
    """
    prompts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
    text = json.dumps(prompts | settings)
    buffer = io.BytesIO()
    if request.format == "png":
        info = PngInfo()
        info.add_itxt(PNG_KEY, text)
        image.save(buffer, "PNG", pnginfo=info, compress_level=PNG_LEVEL)
        return buffer.getvalue()
    exif = Image.Exif()
    # Two prompts of the greatest length do not fit; the numbers always do.
    exif[EXIF_IMAGE_DESCRIPTION] = text if len(text) <= MAX_EXIF_BYTES else json.dumps(settings)
    image.save(buffer, request.format.upper(), exif=exif, quality=QUALITY)
    return buffer.getvalue()


def read_settings(image: Image.Image) -> dict[str, Any]:
    """The settings in an image's metadata; empty where there are none."""
    text = image.info.get(PNG_KEY) or image.getexif().get(EXIF_IMAGE_DESCRIPTION) or "{}"
    settings = json.loads(text)
    return settings if isinstance(settings, dict) else {}


def generation_settings(request: FluxRequest, *, model: str, dtype: str) -> dict[str, Any]:
    """Every setting that plain ``FluxPipeline`` needs to make the same image, prompts aside."""
    return {
        "model": model,
        "seed": request.seed,
        "height": request.height,
        "width": request.width,
        "steps": request.steps,
        "guidance": request.guidance,
        "true_cfg_scale": request.true_cfg_scale,
        "max_sequence_length": request.max_sequence_length,
        "dtype": dtype,
    }
