"""The README's picture: prompts with their images, from a running server with the demo's FLUX.

``python demo/readme_picture.py [--url HOST:PORT] [--output docs/images/demo.png]``
"""

from __future__ import annotations

import argparse
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from genserve import Client

PROMPTS = (
    "a red circle on a blue background",
    "a large green star on a yellow background",
    "a small orange heart on black",
    "a purple triangle in the top left corner on white",
    "a yellow square to the left of a white circle on a purple background",
    "a black heart above a large red square on a cyan background",
    "a small pink triangle below a green cross on black",
    "an orange circle to the right of a blue star on white",
)
COLUMNS = 4
SIZE = 192
"""Side of an image in the picture in pixels; images are generated at the checkpoint's native size."""
CAPTION = 56
MARGIN = 8


def draw(url: str, output: Path, *, seed: int, steps: int) -> None:
    """Generate all images at once, and write the picture."""
    with Client(url) as client, ThreadPoolExecutor(len(PROMPTS)) as pool:
        images = list(pool.map(lambda prompt: client.generate(prompt, seed=seed, steps=steps).image, PROMPTS))
    rows = -(-len(PROMPTS) // COLUMNS)
    picture = Image.new("RGB", (COLUMNS * (SIZE + MARGIN) + MARGIN, rows * (SIZE + CAPTION + MARGIN) + MARGIN), "white")
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(13)
    for index, (prompt, image) in enumerate(zip(PROMPTS, images, strict=True)):
        row, column = divmod(index, COLUMNS)
        left, top = MARGIN + column * (SIZE + MARGIN), MARGIN + row * (SIZE + CAPTION + MARGIN)
        picture.paste(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS), (left, top))
        pen.rectangle((left, top, left + SIZE - 1, top + SIZE - 1), outline="lightgray")
        middle = left + SIZE / 2, top + SIZE + CAPTION / 2
        pen.multiline_text(middle, textwrap.fill(prompt, 29), fill="black", font=font, anchor="mm", align="center")
    output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(output, optimize=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Draw the README's picture from a running server.")
    parser.add_argument("--url", default="localhost:8001")
    parser.add_argument("--output", type=Path, default=Path("docs/images/demo.png"))
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    draw(arguments.url, arguments.output, seed=arguments.seed, steps=arguments.steps)


if __name__ == "__main__":
    main()
