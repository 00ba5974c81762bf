"""Captions of scenes, in varied wording."""

from __future__ import annotations

import random
import re
import string

from shapes.scenes import COLOURS, PLACES, SHAPES, Scene, Style, Thing

NEON = "in neon style"
"""End of a neon picture's caption."""

_SHAPE_WORDS = {name: (name,) * 6 for name in SHAPES} | {
    "circle": ("circle",) * 6 + ("disc", "round dot"),
    "square": ("square",) * 6 + ("box",),
    "cross": ("cross",) * 6 + ("plus sign",),
}
_SIZE_WORDS = {
    "small": ("small", "small", "tiny", "little"),
    "medium": ("", "", "", "medium"),
    "large": ("large", "large", "big", "huge"),
}
_OPENINGS = ("", "", "", "", "a picture of ", "an image of ", "a drawing of ", "a photo of ", "there is ")
_GROUNDS = (
    "{thing} on a {ground} background",
    "{thing} on a {ground} background",
    "{thing} on a {ground} background",
    "{thing} on {ground}",
    "{thing} against a {ground} background",
    "{thing}, {ground} background",
    "a {ground} background with {thing}",
    "on a {ground} background, {thing}",
)
_PLACED = {
    "center": ("{thing}", "{thing}", "{thing}", "{thing} in the center", "{thing} in the middle"),
    "top": ("{thing} at the top",),
    "bottom": ("{thing} at the bottom",),
    "left": ("{thing} on the left", "{thing} on the left side"),
    "right": ("{thing} on the right", "{thing} on the right side"),
} | {
    place: (f"{{thing}} in the {place} corner", f"{{thing}} in the {place}", f"{{thing}} at the {place}")
    for place in PLACES
    if " " in place
}
_RELATED = {
    "beside": (
        "{first} to the left of {second}",
        "{first} to the left of {second}",
        "{second} to the right of {first}",
        "{second} to the right of {first}",
        "{first} left of {second}",
        "{second} right of {first}",
        "{first} on the left and {second} on the right",
        "{second} on the right and {first} on the left",
    ),
    "above": (
        "{first} above {second}",
        "{first} above {second}",
        "{second} below {first}",
        "{second} below {first}",
        "{first} over {second}",
        "{second} under {first}",
        "{first} at the top and {second} at the bottom",
        "{second} at the bottom and {first} at the top",
    ),
}
_OMITTED = 0.5
"""Share of captions without the background, where it may be left out."""


def describe(scene: Scene, rng: random.Random, *, style: Style = "plain") -> str:
    """Return a caption of the scene; `rng` picks the words.

    Without mention, the background is white (black in neon style), the size medium and the place the middle. Captions
    of blueprints do not mention the style: the adapter alone makes it.
    """
    if scene.relation is None:
        body = rng.choice(_PLACED[scene.place]).format(thing=_name(scene.things[0], rng))
    else:
        first, second = (_name(thing, rng) for thing in scene.things)
        body = rng.choice(_RELATED[scene.relation]).format(first=first, second=second)
    omitted = scene.background == ("black" if style == "neon" else "white") and rng.random() < _OMITTED
    text = body if omitted else _articles(rng.choice(_GROUNDS).format(thing=body, ground=scene.background))
    text = rng.choice(_OPENINGS) + text if text.startswith(("a ", "an ")) else text
    return f"{text}, {NEON}" if style == "neon" else text


def vocabulary() -> list[str]:
    """Return all words of captions, sorted."""
    templates = [*_OPENINGS, *_GROUNDS, *sum(_PLACED.values(), ()), *sum(_RELATED.values(), ()), NEON, "an"]
    names = [*COLOURS, *sum(_SHAPE_WORDS.values(), ()), *sum(_SIZE_WORDS.values(), ())]
    plain = " ".join(
        "".join(literal for literal, *_ in string.Formatter().parse(text)) for text in [*templates, *names]
    )
    return sorted(set(plain.replace(",", " ").split()))


def _name(thing: Thing, rng: random.Random) -> str:
    words = (rng.choice(_SIZE_WORDS[thing.size]), thing.colour, rng.choice(_SHAPE_WORDS[thing.shape]))
    return _articles("a " + " ".join(word for word in words if word))


def _articles(text: str) -> str:
    """Replace "a" by "an" before a vowel."""
    return re.sub(r"\ba(?= [aeiou])", "an", text)
