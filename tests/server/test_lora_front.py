"""Adapters and skipped steps from the callers' side: client, command line and gateway, with the demo's LoRAs."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import Server
from gateways import running_gateway
from PIL import Image

from genserve import Client, InvalidInput

PROMPT = "a large green square"


def middle(image: Image.Image) -> np.ndarray:
    """Return the mean colour of the middle, red, green and blue."""
    pixels: np.ndarray = np.asarray(image.convert("RGB"))[56:72, 56:72].mean(axis=(0, 1))
    return pixels


def test_every_form_of_adapters_makes_the_same_image(client: Client) -> None:
    plain = client.generate(PROMPT, steps=20, seed=1)
    neon = client.generate(PROMPT, steps=20, seed=1, lora="neon")
    assert middle(plain.image)[1] > 130, "a square is filled"
    assert middle(neon.image).max() < 90, "an outline is dark inside"
    assert neon.info["lora"] == [{"name": "neon", "weight": 1.0}]
    assert not plain.info.get("lora")
    forms = [("neon", 1.0), {"neon": 1.0}, ["neon"], [("neon", 1)], [{"name": "neon", "weight": 1.0}]]
    made = client.map_generate([{"prompt": PROMPT, "lora": form} for form in forms], steps=20, seed=1)
    pixels = [np.asarray(each.result.image).astype(int) for each in made]
    assert max(int(abs(each - np.asarray(neon.image)).max()) for each in pixels) <= 1


@pytest.mark.parametrize("lora", ["no-such", ["neon", "no-such"], "../neon", "neon\\..\\neon", "x" * 5_000])
def test_unknown_adapter_is_invalid_input(client: Client, lora: str | list[str]) -> None:
    with pytest.raises(InvalidInput, match="LORA"):
        client.generate(PROMPT, steps=2, seed=1, lora=lora)


def test_skipped_steps_are_told(client: Client) -> None:
    assert client.generate(PROMPT, steps=28, seed=1).info.get("skipped_steps", 0) == 0
    assert client.generate(PROMPT, steps=28, seed=1, cache=0.3).info["skipped_steps"] > 0
    for cache in (-0.1, 1.5):
        with pytest.raises(InvalidInput, match="CACHE"):
            client.generate(PROMPT, steps=2, seed=1, cache=cache)


def test_command_line_takes_adapters(server: Server, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    options = ["--lora", "neon=0.6", "--lora", "blueprint=0.6", "--seed", "1", "--url", server.grpc]
    done = server.command("generate", PROMPT, "-o", str(image), "--steps", "20", *options)
    assert (done.returncode, done.stderr) == (0, "")
    red, _, blue = middle(Image.open(image))
    assert blue > red + 10, "the inside of the outline is blue"
    refused = server.command("generate", PROMPT, "-o", str(image), "--lora", "no-such", "--url", server.grpc)
    assert refused.returncode == 1
    assert refused.stderr.startswith("genserve: InvalidInput: LORA")


def test_gateway_takes_adapters(server: Server, tmp_path: Path) -> None:
    body = {"prompt": PROMPT, "num_inference_steps": 20, "seed": 1, "lora": {"blueprint": 1.0}}
    with running_gateway(tmp_path, server.grpc) as gateway, httpx.Client(base_url=gateway.url, timeout=60) as http:
        openai = http.post("/v1/images/generations", json=body).json()["data"][0]["b64_json"]
        own = http.post("/generate", json=body).json()["image"]
        refused = http.post("/v1/images/generations", json={**body, "lora": "no-such"})
    for text in (openai, own):
        red, _, blue = middle(Image.open(io.BytesIO(base64.b64decode(text))))
        assert blue > red + 60, "a blueprint is blue"
    assert refused.status_code == 400
    assert "LORA" in refused.json()["error"]["message"]
