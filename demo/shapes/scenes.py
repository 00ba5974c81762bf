"""Scenes: one or two coloured shapes on a plain background."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from typing import Literal

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 40, 44),
    "orange": (245, 135, 25),
    "yellow": (250, 220, 55),
    "green": (46, 165, 72),
    "cyan": (70, 205, 220),
    "blue": (44, 84, 215),
    "purple": (130, 50, 170),
    "pink": (248, 150, 195),
    "white": (246, 246, 246),
    "black": (22, 22, 24),
}
"""Red, green and blue (0 to 255) by colour."""
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
SIZES = ("small", "medium", "large")
PLACES: dict[str, tuple[float, float]] = {
    "top left": (0.25, 0.25),
    "top": (0.5, 0.25),
    "top right": (0.75, 0.25),
    "left": (0.25, 0.5),
    "center": (0.5, 0.5),
    "right": (0.75, 0.5),
    "bottom left": (0.25, 0.75),
    "bottom": (0.5, 0.75),
    "bottom right": (0.75, 0.75),
}
"""Center of a single thing from the left and from the top, as shares of the picture."""

Style = Literal["plain", "neon", "blueprint"]
Relation = Literal["beside", "above"]
"""Position of the first of two things: to the left of the second, or above it."""

_ALONE = {"small": 0.14, "medium": 0.21, "large": 0.3}
_PAIRED = {"small": 0.11, "medium": 0.155, "large": 0.205}
_MARGIN = 0.03
_HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Thing:
    """A coloured shape at its place."""

    shape: str
    colour: str
    size: str
    x: float
    """Center from the left, as a share of the width."""
    y: float
    """Center from the top, as a share of the height."""
    radius: float
    """Half the extent, as a share of the picture's shorter side."""


@dataclass(frozen=True)
class Scene:
    """A background with one thing, or with two: the left one first, or the upper one."""

    background: str
    things: tuple[Thing, ...]
    place: str = "center"
    """Place of a single thing, a name of `PLACES`."""
    relation: Relation | None = None
    """Relation of two things."""

    @property
    def held_out(self) -> bool:
        """Return True if training never has a thing's shape and colour on this background.

        One in ten of these combinations is held out for the evaluation, always the same ones; the others contain every
        shape and every colour.
        """
        return any(
            zlib.crc32(f"{thing.shape} {thing.colour} {self.background}".encode()) % _HELD_OUT_ONE_IN == 0
            for thing in self.things
        )


def draw_scene(rng: random.Random, *, held_out: bool, two: bool | None = None, style: Style = "plain") -> Scene:
    """Draw a random scene.

    Args:
        rng: Source of randomness.
        held_out: True for a scene held out of training, False for one in training.
        two: True for two things, False for one; by default three scenes in five have two.
        style: A neon scene has a black background and things of other colours. The other styles take any scene.
    """
    while True:
        scene = _any_scene(rng, two=rng.random() < 0.6 if two is None else two, style=style)
        if scene.held_out == held_out:
            return scene


def _any_scene(rng: random.Random, *, two: bool, style: Style) -> Scene:
    background = "black" if style == "neon" else rng.choice(list(COLOURS))
    colours = [colour for colour in COLOURS if colour != background]
    kinds = rng.sample([(shape, colour) for shape in SHAPES for colour in colours], 2 if two else 1)
    if not two:
        place = rng.choice([*PLACES, *["center"] * 5])
        middle = PLACES[place]
        return Scene(background, (_thing(rng, kinds[0], middle, _ALONE, jitter=(0.03, 0.03)),), place=place)
    relation: Relation = rng.choice(("beside", "above"))
    things = []
    for kind, along in zip(kinds, (0.26, 0.74), strict=True):
        middle, jitter = ((along, 0.5), (0.02, 0.1)) if relation == "beside" else ((0.5, along), (0.1, 0.02))
        things.append(_thing(rng, kind, middle, _PAIRED, jitter=jitter))
    return Scene(background, tuple(things), relation=relation)


def _thing(
    rng: random.Random,
    kind: tuple[str, str],
    middle: tuple[float, float],
    radii: dict[str, float],
    *,
    jitter: tuple[float, float],
) -> Thing:
    size = rng.choice((*SIZES, "medium"))
    radius = radii[size] * rng.uniform(0.94, 1.06)
    low, high = radius + _MARGIN, 1 - radius - _MARGIN
    x, y = (
        min(max(share + rng.uniform(-wobble, wobble), low), high) for share, wobble in zip(middle, jitter, strict=True)
    )
    return Thing(*kind, size, x, y, radius)
