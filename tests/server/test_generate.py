"""`flux` through the client, over gRPC and HTTP."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from conftest import Server
from pictures import Pixels, levels, same
from PIL import Image, ImageChops

from genserve import Client, InvalidInput
from genserve_backend.flux.image_file import embedded_settings

PROMPT = "a red circle on a blue background"


def test_defaults_come_from_the_checkpoint(client: Client) -> None:
    image = client.generate(PROMPT)
    assert image.image.size == (128, 128)
    assert image.image.format == "PNG"
    assert image.info["steps"] == 28
    assert image.info["guidance"] == 3.5
    assert image.info["max_sequence_length"] == 32
    assert image.info["seed"] == image.seed >= 0


def test_info_has_the_times_of_each_phase(client: Client) -> None:
    info = client.generate(PROMPT, steps=4, task_id="told").info
    assert info["task_id"] == "told"
    assert info["instance"] == "flux_0_0"
    assert (info["device"], info["gpu_id"]) == ("cpu", None)
    parts = [info[name] for name in ("queue_s", "encode_s", "denoise_s", "decode_s")]
    assert all(part >= 0 for part in parts)
    assert sum(parts) == pytest.approx(info["elapsed_time"], abs=0.05)
    assert info["mean_batch_size"] == 1.0


def test_returned_seed_reproduces_the_file(client: Client) -> None:
    first = client.generate(PROMPT, steps=4)
    again = client.generate(PROMPT, steps=4, seed=first.seed)
    assert again.data == first.data


def test_other_seed_changes_the_image(client: Client) -> None:
    one, other = (client.generate(PROMPT, steps=4, seed=seed).image for seed in (1, 2))
    assert ImageChops.difference(one, other).getbbox()


def test_both_protocols_return_the_same_file(server: Server) -> None:
    with Client(server.grpc) as over_grpc, Client(server.http) as over_http:
        assert over_grpc.generate(PROMPT, steps=4, seed=3).data == over_http.generate(PROMPT, steps=4, seed=3).data


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_image_formats_contain_the_settings(client: Client, image_format: str) -> None:
    image = client.generate(PROMPT, steps=2, seed=2**63 - 1, height=64, width=96, format=image_format)
    decoded = Image.open(io.BytesIO(image.data))
    assert decoded.format == image_format.upper()
    assert decoded.size == (96, 64)
    settings = embedded_settings(decoded)
    assert settings["prompt"] == PROMPT
    assert settings["seed"] == 2**63 - 1
    assert settings.items() >= {"height": 64, "width": 96, "steps": 2}.items()


def test_every_setting_changes_the_image(client: Client) -> None:
    base = {"steps": 4, "seed": 5, "height": 64, "width": 64}
    plain = client.generate(PROMPT, **base).image
    changes = [{"guidance": 7.0}, {"steps": 5}, {"negative_prompt": "green"}]
    for change in changes:
        changed = client.generate(PROMPT, **{**base, **change}).image
        assert ImageChops.difference(plain, changed).getbbox(), change


def test_true_cfg_scale_has_no_effect_without_a_negative_prompt(client: Client) -> None:
    images = [client.generate(PROMPT, steps=2, seed=5, true_cfg_scale=scale).image for scale in (1.0, 9.0)]
    assert not ImageChops.difference(*images).getbbox()


def test_any_text_is_a_valid_prompt(client: Client) -> None:
    for prompt in ("一个红色的圆", "\U0001f534 on \U0001f535", "x" * 10_000, "\n\t", "\x00"):
        assert client.generate(prompt, steps=1, height=64, width=64).image.size == (64, 64)


def test_concurrent_callers_get_their_own_image(client: Client) -> None:
    seeds = range(12)

    def make(seed: int) -> Pixels:
        return levels(client.generate(PROMPT, steps=2, seed=seed, height=64, width=64).data)

    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(make, seeds))
    alone = [make(seed) for seed in seeds]
    assert all(same(*pair) for pair in zip(alone, together, strict=True))
    assert not any(same(*pair) for pair in pairwise(together))


def test_unknown_adapters_are_rejected(client: Client) -> None:
    with pytest.raises(InvalidInput, match="LORA"):
        client.generate(PROMPT, lora=[{"name": "unknown", "weight": 1.0}])
