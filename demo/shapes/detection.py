"""Detection of the background and things of a picture, from the pixels alone and without a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from scipy import ndimage

from shapes.drawing import outline
from shapes.scenes import COLOURS, SHAPES

Mask = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.float64]

UNKNOWN = "unknown"
"""Shape of a thing that resembles none of `SHAPES`."""

_BORDER = 3
"""Pixels along the edges that count as background."""
_CONTRAST = 45.0
"""Minimum distance in RGB from the background: half the distance of the two nearest colours."""
_SMALLEST = 0.004
"""Minimum share of the picture's area for a thing."""
_TEMPLATE = 40
"""Side in pixels to which things and shapes are scaled for comparison."""
_OVERLAP = 0.65
"""Minimum intersection over union of a thing and its shape."""


@dataclass(frozen=True)
class DetectedThing:
    """A thing in a picture."""

    shape: str
    colour: str
    x: float
    """Center of its box from the left, as a share of the width."""
    y: float
    """Center of its box from the top, as a share of the height."""
    area: int
    """Pixels."""


@dataclass(frozen=True)
class Detection:
    """Background and things of a picture, the largest thing first."""

    background: str
    things: tuple[DetectedThing, ...]


def detect(picture: Image.Image) -> Detection:
    """Detect the background and things of a picture with at least 32 by 32 pixels."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
    ground = _ground(pixels)
    spots, count = ndimage.label(np.linalg.norm(pixels - ground, axis=-1) > _CONTRAST)
    masks = [spots == index for index in range(1, count + 1)]
    things = [_detect_thing(pixels, mask) for mask in masks if mask.mean() >= _SMALLEST]
    return Detection(_nearest(ground), tuple(sorted(things, key=lambda thing: -thing.area)))


def _ground(pixels: Pixels) -> Pixels:
    inside = np.zeros(pixels.shape[:2], dtype=bool)
    inside[_BORDER:-_BORDER, _BORDER:-_BORDER] = True
    ground: Pixels = np.median(pixels[~inside], axis=0)
    return ground


def _detect_thing(pixels: Pixels, mask: Mask) -> DetectedThing:
    height, width = mask.shape
    rows, columns = ndimage.find_objects(mask.astype(np.uint8))[0]
    core = ndimage.binary_erosion(mask, iterations=2)
    colour = np.median(pixels[core if core.any() else mask], axis=0)
    return DetectedThing(
        shape=_shape(mask[rows, columns]),
        colour=_nearest(colour),
        x=(columns.start + columns.stop) / 2 / width,
        y=(rows.start + rows.stop) / 2 / height,
        area=int(mask.sum()),
    )


def _nearest(colour: Pixels) -> str:
    return min(COLOURS, key=lambda name: float(np.linalg.norm(colour - COLOURS[name])))


def _shape(mask: Mask) -> str:
    """Return the shape with the largest overlap, scaled to the same box."""
    box = Image.fromarray(mask.astype(np.uint8) * 255).resize((_TEMPLATE, _TEMPLATE), Image.Resampling.BOX)
    scaled = np.asarray(box) > 127
    overlap = {shape: (scaled & each).sum() / (scaled | each).sum() for shape, each in _templates().items()}
    best = max(overlap, key=lambda shape: overlap[shape])
    return best if overlap[best] >= _OVERLAP else UNKNOWN


@cache
def _templates() -> dict[str, Mask]:
    """Return each shape, scaled to a square box."""
    masks = {}
    for shape in SHAPES:
        corners = np.array(outline(shape))
        low, high = corners.min(axis=0), corners.max(axis=0)
        scaled = (corners - low) / (high - low) * (_TEMPLATE - 1)
        canvas = Image.new("1", (_TEMPLATE, _TEMPLATE))
        ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in scaled], fill=1)
        masks[shape] = np.asarray(canvas)
    return masks
