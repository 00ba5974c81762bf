"""Reads a picture: which background, which things, where. From the pixels alone, without any learnt part."""

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
"""The shape of what looks like none."""

_BORDER = 3
"""Pixels along the edges that are taken for the background."""
_DIFFERENT = 45.0
"""The distance in RGB from which on a pixel is not background: half of that between the two nearest colours."""
_SMALLEST = 0.004
"""The share of the picture below which a spot is not a thing."""
_TEMPLATE = 40
"""Pixels of the side to which a thing and the shapes are scaled to be compared."""
_ALIKE = 0.65
"""The share of their union that a thing and a shape must have in common."""


@dataclass(frozen=True)
class Seen:
    """A thing in a picture."""

    shape: str
    colour: str
    x: float
    """The middle of its box from the left, as a share of the width."""
    y: float
    """The middle of its box from the top, as a share of the height."""
    area: int
    """In pixels."""


@dataclass(frozen=True)
class Reading:
    """What is in a picture, the largest thing first."""

    background: str
    things: tuple[Seen, ...]


def read_picture(picture: Image.Image) -> Reading:
    """Tell background and things of a picture of at least 32 by 32 pixels."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
    ground = _ground(pixels)
    spots, count = ndimage.label(np.linalg.norm(pixels - ground, axis=-1) > _DIFFERENT)
    masks = [spots == index for index in range(1, count + 1)]
    things = [_see(pixels, mask) for mask in masks if mask.mean() >= _SMALLEST]
    return Reading(_nearest(ground), tuple(sorted(things, key=lambda thing: -thing.area)))


def _ground(pixels: Pixels) -> Pixels:
    inside = np.zeros(pixels.shape[:2], dtype=bool)
    inside[_BORDER:-_BORDER, _BORDER:-_BORDER] = True
    ground: Pixels = np.median(pixels[~inside], axis=0)
    return ground


def _see(pixels: Pixels, mask: Mask) -> Seen:
    height, width = mask.shape
    rows, columns = ndimage.find_objects(mask.astype(np.uint8))[0]
    core = ndimage.binary_erosion(mask, iterations=2)
    colour = np.median(pixels[core if core.any() else mask], axis=0)
    return Seen(
        shape=_shape(mask[rows, columns]),
        colour=_nearest(colour),
        x=(columns.start + columns.stop) / 2 / width,
        y=(rows.start + rows.stop) / 2 / height,
        area=int(mask.sum()),
    )


def _nearest(colour: Pixels) -> str:
    return min(COLOURS, key=lambda name: float(np.linalg.norm(colour - COLOURS[name])))


def _shape(mask: Mask) -> str:
    """The shape with the largest overlap when both fill the same box."""
    box = Image.fromarray(mask.astype(np.uint8) * 255).resize((_TEMPLATE, _TEMPLATE), Image.Resampling.BOX)
    scaled = np.asarray(box) > 127
    overlap = {shape: (scaled & each).sum() / (scaled | each).sum() for shape, each in _templates().items()}
    best = max(overlap, key=lambda shape: overlap[shape])
    return best if overlap[best] >= _ALIKE else UNKNOWN


@cache
def _templates() -> dict[str, Mask]:
    """Each shape, filling a square box."""
    masks = {}
    for shape in SHAPES:
        corners = np.array(outline(shape))
        low, high = corners.min(axis=0), corners.max(axis=0)
        scaled = (corners - low) / (high - low) * (_TEMPLATE - 1)
        canvas = Image.new("1", (_TEMPLATE, _TEMPLATE))
        ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in scaled], fill=1)
        masks[shape] = np.asarray(canvas)
    return masks
