"""Antialiased pictures of scenes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from shapes.scenes import COLOURS, Scene, Style, Thing

_OVERSAMPLING = 4
"""Factor by which pictures are drawn larger, for antialiasing."""
_COLOUR_JITTER = 6
"""Maximum deviation of a colour, in levels per channel."""
_PAPER, _INK = (34, 72, 180), (240, 244, 250)
"""Colours of a blueprint."""
_LINE = {"neon": 1 / 7, "blueprint": 1 / 5}
"""Width of outlines, as a share of a thing's radius."""

Point = tuple[float, float]
Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""


def outline(shape: str) -> list[Point]:
    """Return the corners of a shape with radius 1 around the origin, y downwards."""
    return _OUTLINES[shape]()


def draw_picture(scene: Scene, *, width: int, height: int, rng: random.Random, style: Style = "plain") -> Image.Image:
    """Draw the scene in RGB; `rng` varies the colours a little. A blueprint has its own in place of the scene's."""
    size = width * _OVERSAMPLING, height * _OVERSAMPLING
    is_blueprint = style == "blueprint"
    picture = Image.new("RGB", size, _shade(_PAPER if is_blueprint else COLOURS[scene.background], rng))
    for thing in scene.things:
        colour = _shade(_INK if is_blueprint else COLOURS[thing.colour], rng)
        corners = _place(thing, size)
        line = _LINE.get(style, 0.0) * thing.radius * min(size)
        if style == "plain":
            ImageDraw.Draw(picture).polygon(corners, fill=colour)
        elif style == "neon":
            picture = _glow(picture, corners, colour, width=line)
        else:
            _trace(picture, corners, colour, width=line)
    return picture.reduce(_OVERSAMPLING)


def _trace(picture: Image.Image, corners: list[Point], colour: Colour, *, width: float) -> None:
    """Draw the outline."""
    ImageDraw.Draw(picture).line([*corners, *corners[:2]], fill=colour, width=round(width), joint="curve")


def _glow(picture: Image.Image, corners: list[Point], colour: Colour, *, width: float) -> Image.Image:
    """Draw a glowing tube along the outline."""
    tube = Image.new("RGB", picture.size)
    _trace(tube, corners, colour, width=width)
    shine = tube.filter(ImageFilter.BoxBlur(width))
    return ImageChops.lighter(ImageChops.add(picture, shine.point(lambda level: level // 2)), tube)


def _shade(colour: Colour, rng: random.Random) -> Colour:
    red, green, blue = (min(max(level + rng.randint(-_COLOUR_JITTER, _COLOUR_JITTER), 0), 255) for level in colour)
    return red, green, blue


def _place(thing: Thing, size: tuple[int, int]) -> list[Point]:
    width, height = size
    radius = thing.radius * min(size)
    return [(thing.x * width + radius * x, thing.y * height + radius * y) for x, y in outline(thing.shape)]


def _turn(angle: float, radius: float = 1.0) -> Point:
    """Return a point at an angle in degrees, clockwise from the top."""
    return radius * math.sin(math.radians(angle)), -radius * math.cos(math.radians(angle))


def _circle() -> list[Point]:
    return [_turn(angle) for angle in range(0, 360, 5)]


def _square() -> list[Point]:
    return [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]


def _triangle() -> list[Point]:
    return [(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)]


def _star() -> list[Point]:
    return [_turn(36 * index, 1.05 if index % 2 == 0 else 0.45) for index in range(10)]


def _heart() -> list[Point]:
    """Return the curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, in the unit square."""
    points = []
    for angle in range(0, 360, 5):
        t = math.radians(angle)
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((math.sin(t) ** 3, -(y + 2.5) / 15))
    return points


def _cross() -> list[Point]:
    arm = 0.34
    quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
    points = []
    for _ in range(4):
        points += quarter
        quarter = [(-y, x) for x, y in quarter]
    return points


_OUTLINES: dict[str, Callable[[], list[Point]]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
}
