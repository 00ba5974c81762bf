"""Each request gets the image of its own prompt, also in batches."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import islice, product

import pytest
from conftest import PROTOCOLS, Server

from genserve import Client
from shapes.detection import detect
from shapes.scenes import COLOURS, SHAPES

COUNT = 32
STEP = 17
"""Every 17th combination is used, which covers all shapes and colours."""


def combinations() -> list[tuple[str, str, str]]:
    """Return shape, colour and background per request, all different."""
    every = [(shape, colour, ground) for colour, ground, shape in product(COLOURS, COLOURS, SHAPES) if colour != ground]
    return list(islice(every, 0, None, STEP))[:COUNT]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_each_of_32_concurrent_requests_gets_its_own_image(server: Server, protocol: str) -> None:
    asked = combinations()
    assert len(set(asked)) == COUNT
    with Client(server.url(protocol), timeout=120) as client, ThreadPoolExecutor(COUNT) as pool:
        prompts = [f"a large {colour} {shape} on a {ground} background" for shape, colour, ground in asked]
        images = list(pool.map(lambda prompt: client.generate(prompt, steps=20, seed=1), prompts))
    assert max(image.info["mean_batch_size"] for image in images) > 2
    detections = [detect(image.image) for image in images]
    drawn = [(detection.things[0].shape, detection.things[0].colour, detection.background) for detection in detections]
    assert drawn == asked
