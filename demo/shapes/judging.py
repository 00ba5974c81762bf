"""Says what in a picture is as its scene wants it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

from shapes.reading import Reading, Seen
from shapes.scenes import PLACES, Scene, Thing

_NEAR = 0.15
"""How far from its place the middle of a single thing may be, as a share of the picture in each direction."""


def judge(scene: Scene, reading: Reading) -> Iterator[tuple[str, bool]]:
    """The aspects of the scene, each with whether the picture has it.

    Background and number of things once; colour and shape once for each thing of the scene; place for a single thing,
    relation for two. A thing that is missing has everything wrong.
    """
    pairs = _match(scene, reading)
    yield "background", reading.background == scene.background
    yield "number", len(reading.things) == len(scene.things)
    for thing, seen in pairs:
        yield "colour", seen is not None and seen.colour == thing.colour
        yield "shape", seen is not None and seen.shape == thing.shape
    if scene.relation is None:
        yield "place", _in_place(scene.place, pairs[0][1])
    else:
        yield "relation", _related(scene, pairs)


def _match(scene: Scene, reading: Reading) -> list[tuple[Thing, Seen | None]]:
    """Each thing of the scene with the one in the picture that is most like it, wherever that is."""
    count = len(scene.things)
    seen: list[Seen | None] = [*reading.things[:count], *[None] * (count - len(reading.things))]
    orders = [list(zip(scene.things, order, strict=True)) for order in permutations(seen)]
    return max(orders, key=lambda pairs: sum(_alike(thing, each) for thing, each in pairs))


def _alike(thing: Thing, seen: Seen | None) -> int:
    return 0 if seen is None else (thing.colour == seen.colour) + (thing.shape == seen.shape)


def _in_place(place: str, seen: Seen | None) -> bool:
    x, y = PLACES[place]
    return seen is not None and abs(seen.x - x) < _NEAR and abs(seen.y - y) < _NEAR


def _related(scene: Scene, pairs: list[tuple[Thing, Seen | None]]) -> bool:
    (_, first), (_, second) = pairs
    if first is None or second is None or not all(_alike(thing, seen) for thing, seen in pairs):
        return False
    across, down = second.x - first.x, second.y - first.y
    return across > abs(down) if scene.relation == "beside" else down > abs(across)
