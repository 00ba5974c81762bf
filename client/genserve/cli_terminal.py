"""Output for a person at a terminal: the steps of an image, and the image itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

from genserve.cli_options import fail
from genserve.types import TaskStatus

BAR = "{desc} |{bar}| {n_fmt}/{total_fmt} steps, {elapsed}"
LINES_BELOW = 2
"""Lines that stay free below an image: the summary and the prompt."""


@contextmanager
def step_bar(*, hidden: bool = False) -> Iterator[Callable[[TaskStatus], None] | None]:
    """Show a live bar of denoising steps on standard error, and remove it at the end.

    Yields:
        The `on_progress` of `Client.generate`. None if standard error is no terminal or the bar is `hidden`.
    """
    if hidden or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc="waiting", file=sys.stderr, bar_format=BAR, dynamic_ncols=True, leave=False) as bar:

        def show(task: TaskStatus) -> None:
            bar.total = task.steps or None
            bar.n = task.step
            bar.set_description_str(task.state)  # draws the bar

        yield show


def image_drawer() -> Callable[[Image.Image], None]:
    """Return a function that draws an image on standard output, as large as the terminal allows.

    Exit with one line if that cannot work. The terminal is asked for its abilities now, before an image is made:
    kitty's protocol, sixels, or coloured half blocks.
    """
    # The library reads the terminal's answers from standard input.
    if not all(stream and stream.isatty() for stream in (sys.__stdin__, sys.__stdout__)):
        fail("--show needs a terminal as standard input and output")
    try:
        from rich.console import Console
        from textual_image.renderable import Image as Picture
    except ModuleNotFoundError:
        fail("--show needs: pip install 'genserve[terminal]'")
    console = Console(no_color=False)
    if console.color_system is None:
        fail("--show needs a terminal with colours")

    def draw(image: Image.Image) -> None:
        picture: Any = Picture(image, width="auto", height="auto")
        console.print(picture, height=max(1, console.height - LINES_BELOW))

    return draw
