"""Draws the README's picture from a running server: prompts and the images that the served checkpoint makes of them.

``python demo/picture.py [--url HOST:PORT] [--output docs/images/demo.png]``
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from genserve import Client

PROMPTS = (
    "a red circle on a blue background",
    "a green square on a white background",
    "a yellow triangle above a black line",
    "two small circles, one of them purple",
)
SIZE = 256
"""Pixels of one image in the picture; the images are made at the checkpoint's native size."""
CAPTION = 28
MARGIN = 8


def draw(url: str, output: Path, *, seed: int = 7, steps: int = 20) -> None:
    """Make the images and write the picture."""
    width = len(PROMPTS) * (SIZE + MARGIN) + MARGIN
    picture = Image.new("RGB", (width, SIZE + CAPTION + 2 * MARGIN), "white")
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(13)
    with Client(url) as client:
        for column, prompt in enumerate(PROMPTS):
            image = client.generate(prompt, seed=seed, steps=steps).image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            left = MARGIN + column * (SIZE + MARGIN)
            picture.paste(image, (left, MARGIN))
            pen.text((left + SIZE / 2, SIZE + MARGIN + CAPTION / 2), prompt, fill="black", font=font, anchor="mm")
    output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(output, optimize=True)


def main() -> None:
    """Read the arguments, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="localhost:8001")
    parser.add_argument("--output", type=Path, default=Path("docs/images/demo.png"))
    arguments = parser.parse_args()
    draw(arguments.url, arguments.output)


if __name__ == "__main__":
    main()
