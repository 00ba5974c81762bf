"""Pictures of the simulated device. Their pixels are the request: prompt, seed and number of steps."""

from __future__ import annotations

import hashlib

from PIL import Image

SIZE = (14, 1)
"""Width and height in pixels, whatever size the request asks for."""
PROMPT_BYTES, SEED_BYTES = 32, 8
STEPS_AT = PROMPT_BYTES + SEED_BYTES
PICTURE_BYTES = 3 * SIZE[0] * SIZE[1]


def prompt_bytes(prompt: str) -> bytes:
    """Return the SHA-256 digest of a prompt."""
    return hashlib.sha256(prompt.encode()).digest()


def seed_bytes(seed: int) -> bytes:
    """Return a seed, 0 to 2**63 - 1, in big-endian order."""
    return seed.to_bytes(SEED_BYTES, "big")


def expected_picture(prompt: str, seed: int, steps: int) -> bytes:
    """Return the RGB bytes of the picture for a request."""
    return (prompt_bytes(prompt) + seed_bytes(seed) + bytes([steps])).ljust(PICTURE_BYTES, b"\0")


def draw(picture: bytes) -> Image.Image:
    """Return the RGB image with these bytes."""
    return Image.frombytes("RGB", SIZE, picture)


def shows(image: Image.Image, prompt: str, seed: int, steps: int) -> bool:
    """Return whether an image is the picture for a request."""
    return image.size == SIZE and image.convert("RGB").tobytes() == expected_picture(prompt, seed, steps)
