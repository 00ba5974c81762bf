"""Every request gets the image of its own prompt, also when many of them share their forwards."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import islice, product

import pytest
from conftest import PROTOCOLS, Server

from genserve import Client
from shapes.reading import read_picture
from shapes.scenes import COLOURS, SHAPES

COUNT = 32
STEP = 17
"""Takes every 17th combination, which spreads over all shapes and colours."""


def combinations() -> list[tuple[str, str, str]]:
    """A shape, its colour and a background for each request, all different."""
    every = [(shape, colour, ground) for colour, ground, shape in product(COLOURS, COLOURS, SHAPES) if colour != ground]
    return list(islice(every, 0, None, STEP))[:COUNT]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_32_at_once_each_get_their_own(server: Server, protocol: str) -> None:
    asked = combinations()
    assert len(set(asked)) == COUNT
    with Client(server.url(protocol), timeout=120) as client, ThreadPoolExecutor(COUNT) as pool:
        prompts = [f"a large {colour} {shape} on a {ground} background" for shape, colour, ground in asked]
        images = list(pool.map(lambda prompt: client.generate(prompt, steps=20, seed=1), prompts))
    assert max(image.info["mean_batch_size"] for image in images) > 2
    readings = [read_picture(image.image) for image in images]
    drawn = [(reading.things[0].shape, reading.things[0].colour, reading.background) for reading in readings]
    assert drawn == asked
