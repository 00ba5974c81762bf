"""The demo's world of shapes: scenes, captions, pictures, and the detection that the evaluation uses."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("scipy", reason="the detection needs the demo extra")

from PIL import Image, ImageFilter

from shapes.captions import NEON, describe, vocabulary
from shapes.detection import UNKNOWN, detect
from shapes.drawing import draw_picture
from shapes.judging import judge
from shapes.scenes import COLOURS, PLACES, SHAPES, SIZES, Scene, Thing, draw_scene

SIZES_PX = [(128, 128), (64, 64), (256, 256), (96, 160), (192, 128)]


def one(*, background: str = "blue", shape: str = "circle", colour: str = "red", place: str = "center") -> Scene:
    x, y = PLACES[place]
    return Scene(background, (Thing(shape, colour, "medium", x, y, 0.2),), place=place)


def two(*, background: str = "white", swapped: bool = False) -> Scene:
    left, right = Thing("star", "red", "medium", 0.26, 0.5, 0.155), Thing("heart", "green", "medium", 0.74, 0.5, 0.155)
    if swapped:
        left, right = replace(right, x=left.x), replace(left, x=right.x)
    return Scene(background, (left, right), relation="beside")


def picture(scene: Scene, *, width: int = 128, height: int = 128) -> Image.Image:
    return draw_picture(scene, width=width, height=height, rng=random.Random(0))


def wrong(scene: Scene, shown: Image.Image) -> set[str]:
    return {aspect for aspect, right in judge(scene, detect(shown)) if not right}


def test_scenes_cover_all_values_and_hold_out_a_tenth() -> None:
    rng = random.Random(1)
    seen = [draw_scene(rng, held_out=False) for _ in range(4000)]
    things = [thing for scene in seen for thing in scene.things]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.size for thing in things} == set(SIZES)
    assert {scene.background for scene in seen} == set(COLOURS)
    assert not any(scene.held_out for scene in seen)
    combinations = [(s, c, b) for s in SHAPES for c in COLOURS for b in COLOURS if b != c]
    kept = [each for each in combinations if one(shape=each[0], colour=each[1], background=each[2]).held_out]
    assert 0.05 < len(kept) / len(combinations) < 0.15
    assert {(t.shape, t.colour, s.background) for s in seen for t in s.things}.isdisjoint(kept)
    assert all(draw_scene(rng, held_out=True).held_out for _ in range(100))


def test_things_are_inside_the_picture_and_do_not_overlap() -> None:
    rng = random.Random(2)
    for _ in range(500):
        scene = draw_scene(rng, held_out=False)
        for thing in scene.things:
            assert thing.radius < min(thing.x, thing.y, 1 - thing.x, 1 - thing.y)
            assert thing.colour != scene.background
        if len(scene.things) == 2:
            first, second = scene.things
            assert max(second.x - first.x, second.y - first.y) > first.radius + second.radius


def test_captions_are_complete_and_use_the_vocabulary() -> None:
    rng, words = random.Random(3), set(vocabulary())
    for _ in range(1000):
        scene = draw_scene(rng, held_out=False)
        told = describe(scene, rng).replace(",", " ").split()
        assert set(told) <= words
        assert {thing.colour for thing in scene.things} <= set(told)
        assert scene.background in told or scene.background == "white"
    assert describe(draw_scene(rng, held_out=False, style="neon"), rng, style="neon").endswith(NEON)


def test_captions_use_the_right_article() -> None:
    captions = {describe(one(colour="orange", background="yellow"), random.Random(seed)) for seed in range(50)}
    assert any("an orange" in caption for caption in captions)
    assert not any("a orange" in caption or "an yellow" in caption for caption in captions)


def test_neon_pictures_are_outlines_on_black() -> None:
    scene = draw_scene(random.Random(4), held_out=False, two=False, style="neon")
    pixels = np.asarray(draw_picture(scene, width=128, height=128, rng=random.Random(0), style="neon")).max(axis=-1)
    thing = scene.things[0]
    assert scene.background == "black"
    assert pixels[int(thing.y * 128), int(thing.x * 128)] < 100 < pixels.max()


def test_blueprints_are_white_outlines_on_blue() -> None:
    rng = random.Random(5)
    for _ in range(20):
        scene = draw_scene(rng, held_out=False, style="blueprint")
        shown = draw_picture(scene, width=128, height=128, rng=rng, style="blueprint")
        pixels = np.asarray(shown)
        assert detect(shown).background == "blue"
        assert (pixels.min(axis=-1) > 200).any(), "an outline is white"
        assert NEON not in describe(scene, rng, style="blueprint")
        for thing in scene.things:
            assert (pixels[int(thing.y * 128), int(thing.x * 128)] == pixels[0, 0]).all(), "the inside is paper"


@pytest.mark.parametrize(("width", "height"), SIZES_PX)
def test_detection_is_right_about_drawn_pictures(width: int, height: int) -> None:
    rng = random.Random(width + height)
    for _ in range(80):
        scene = draw_scene(rng, held_out=rng.random() < 0.5)
        assert wrong(scene, draw_picture(scene, width=width, height=height, rng=rng)) == set()


@pytest.mark.parametrize("blur", [0.7, 1.5])
def test_detection_tolerates_soft_edges(blur: float) -> None:
    scene = two()
    assert wrong(scene, picture(scene).filter(ImageFilter.GaussianBlur(blur))) == set()


@pytest.mark.parametrize(
    ("shown", "missed"),
    [
        (one(background="green"), {"background"}),
        (one(colour="pink"), {"colour"}),
        (one(shape="square"), {"shape"}),
        (one(place="top left"), {"place"}),
        (Scene("blue", ()), {"number", "colour", "shape", "place"}),
        (Scene("blue", (*one().things, Thing("star", "white", "small", 0.5, 0.12, 0.08))), {"number"}),
    ],
    ids=["background", "colour", "shape", "place", "nothing", "one too many"],
)
def test_judge_reports_wrong_aspects_of_one_thing(shown: Scene, missed: set[str]) -> None:
    assert wrong(one(), picture(shown)) == missed


def test_judge_reports_wrong_aspects_of_two_things() -> None:
    assert wrong(two(), picture(two())) == set()
    assert wrong(two(), picture(two(swapped=True))) == {"relation"}
    assert wrong(two(), picture(Scene("white", two().things[:1]))) == {"number", "colour", "shape", "relation"}
    above = Scene("white", tuple(replace(thing, x=0.5, y=thing.x) for thing in two().things), relation="above")
    assert wrong(two(), picture(above)) == {"relation"}
    assert wrong(above, picture(above)) == set()


def test_noise_has_no_known_shape() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8))
    assert {"number", "shape"} <= wrong(two(), noise)
    blot = Image.new("RGB", (128, 128), COLOURS["white"])
    blot.paste(COLOURS["red"], (30, 30, 100, 34))
    blot.paste(COLOURS["red"], (30, 30, 34, 100))
    assert detect(blot).things[0].shape == UNKNOWN
