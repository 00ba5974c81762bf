"""Judgement of a picture: the aspects of its scene that it shows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

from shapes.detection import DetectedThing, Detection
from shapes.scenes import PLACES, Scene, Thing

_NEAR = 0.15
"""Maximum distance of a single thing's center from its place, as a share of the picture in each direction."""


def judge(scene: Scene, detection: Detection) -> Iterator[tuple[str, bool]]:
    """Yield the aspects of the scene, with True for those that the picture shows.

    Background and number of things once; colour and shape once per thing of the scene; place for a single thing,
    relation for two. All aspects of a missing thing are wrong.
    """
    pairs = _match(scene, detection)
    yield "background", detection.background == scene.background
    yield "number", len(detection.things) == len(scene.things)
    for thing, found in pairs:
        yield "colour", found is not None and found.colour == thing.colour
        yield "shape", found is not None and found.shape == thing.shape
    if scene.relation is None:
        yield "place", _in_place(scene.place, pairs[0][1])
    else:
        yield "relation", _related(scene, pairs)


def _match(scene: Scene, detection: Detection) -> list[tuple[Thing, DetectedThing | None]]:
    """Pair each thing of the scene with the most similar one in the picture, at any place."""
    count = len(scene.things)
    seen: list[DetectedThing | None] = [*detection.things[:count], *[None] * (count - len(detection.things))]
    orders = [list(zip(scene.things, order, strict=True)) for order in permutations(seen)]
    return max(orders, key=lambda pairs: sum(_alike(thing, each) for thing, each in pairs))


def _alike(thing: Thing, seen: DetectedThing | None) -> int:
    return 0 if seen is None else (thing.colour == seen.colour) + (thing.shape == seen.shape)


def _in_place(place: str, seen: DetectedThing | None) -> bool:
    x, y = PLACES[place]
    return seen is not None and abs(seen.x - x) < _NEAR and abs(seen.y - y) < _NEAR


def _related(scene: Scene, pairs: list[tuple[Thing, DetectedThing | None]]) -> bool:
    (_, first), (_, second) = pairs
    if first is None or second is None or not all(_alike(thing, found) for thing, found in pairs):
        return False
    across, down = second.x - first.x, second.y - first.y
    return across > abs(down) if scene.relation == "beside" else down > abs(across)
