"""The forward in parts against the transformer's own, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from genserve_backend.flux.attention import RaggedAttention, complex_rotation
from genserve_backend.flux.forward import Context, Forward, Rows, States
from genserve_backend.flux.step_cache import CachedRow, FirstBlockCache, MagCache, NoCache
from random_flux import flux_transformer

ROWS, TEXT, IMAGE = 3, 8, 12
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["dev", "schnell"])
def transformer(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(3)
    made = flux_transformer(guidance_embeds=request.param == "dev").eval()
    made.set_attn_processor(RaggedAttention())
    return made


def draw(transformer: Any, dtype: torch.dtype, *, masked: bool) -> dict[str, Any]:
    torch.manual_seed(4)
    config = transformer.config
    ids = torch.zeros(TEXT + IMAGE, 3)
    ids[TEXT:, 1] = torch.arange(IMAGE)
    rotation = complex_rotation(*transformer.pos_embed(ids))[None, :, None]
    lengths = torch.tensor([TEXT + IMAGE, TEXT + IMAGE - 3, TEXT + IMAGE - 5])
    return {
        "latents": torch.randn(ROWS, IMAGE, config.in_channels, dtype=dtype),
        "timesteps": torch.tensor([0.9, 0.5, 0.1], dtype=dtype),
        "guidance": torch.tensor([3.5, 1.0, 7.0]) if config.guidance_embeds else None,
        "pooled": torch.randn(ROWS, config.pooled_projection_dim, dtype=dtype),
        "text": torch.randn(ROWS, TEXT, config.joint_attention_dim, dtype=dtype),
        "rotation": rotation.expand(ROWS, -1, -1, -1) if masked else rotation,
        "mask": (torch.arange(TEXT + IMAGE) < lengths[:, None])[:, None, None] if masked else None,
    }


def whole(transformer: Any, given: dict[str, Any]) -> torch.Tensor:
    velocities: torch.Tensor = transformer(
        hidden_states=given["latents"],
        timestep=given["timesteps"],
        guidance=given["guidance"],
        pooled_projections=given["pooled"],
        encoder_hidden_states=given["text"],
        txt_ids=torch.zeros(1, 3),
        img_ids=torch.zeros(1, 3),
        joint_attention_kwargs={"rotation": given["rotation"], "attention_mask": given["mask"]},
        return_dict=False,
    )[0]
    return velocities


def parts(forward: Forward, given: dict[str, Any], cache: Any, rows: list[CachedRow]) -> tuple[torch.Tensor, Any]:
    image = forward.embed_image(given["latents"])
    conditioning = forward.embed_conditioning(given["timesteps"], given["guidance"], given["pooled"])
    states = States(image, forward.embed_text(given["text"]))
    output = cache.run(
        forward, states, Context(conditioning, given["rotation"], given["mask"], [None] * len(rows)), rows
    )
    return forward.head(output.image, conditioning), output


PLAIN = [CachedRow(0.0, 0, 4, IMAGE, None)] * ROWS


@torch.inference_mode()
@pytest.mark.parametrize("masked", [False, True], ids=["one size", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_are_the_forward(transformer: Any, dtype: torch.dtype, *, masked: bool) -> None:
    transformer = transformer.to(dtype)
    given = draw(transformer, dtype, masked=masked)
    velocities, output = parts(Forward(transformer), given, NoCache(), PLAIN)
    assert torch.equal(velocities, whole(transformer, given))
    assert not any(output.skipped)
    transformer.to(torch.float32)


@torch.inference_mode()
@pytest.mark.parametrize("masked", [False, True], ids=["one size", "masked"])
def test_skipping_rows_leave_the_others_as_they_are(transformer: Any, *, masked: bool) -> None:
    given = draw(transformer, torch.float32, masked=masked)
    forward, cache = Forward(transformer), MagCache((1.0,))
    expected, first = parts(forward, given, cache, [CachedRow(0.5, 0, 100, IMAGE, None)] * ROWS)
    # At the same inputs, the residual is exact: the skipped row gets what it would compute.
    calls: list[tuple[int, ...]] = []
    real = forward.run_blocks

    def run_blocks(states: States, context: Context, rows: Rows, **blocks: Any) -> States:
        calls.append(rows.numbers)
        return real(states, context, rows, **blocks)

    forward.run_blocks = run_blocks  # type: ignore[method-assign]
    skipping = CachedRow(0.5, 50, 100, IMAGE, first.residuals[1])
    velocities, output = parts(forward, given, cache, [PLAIN[0], skipping, PLAIN[0]])
    assert calls == [(0, 2)]
    assert list(output.skipped) == [False, True, False]
    assert output.residuals[1] is first.residuals[1]
    assert output.residuals[0] is output.residuals[2] is None
    assert torch.allclose(velocities, expected, atol=1e-5)
    calls.clear()
    parts(forward, given, cache, [skipping] * ROWS)
    assert calls == []


@torch.inference_mode()
def test_first_block_reads_the_device_once_for_all_rows(transformer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = draw(transformer, torch.float32, masked=True)
    forward, cache, reads = Forward(transformer), FirstBlockCache(), list[int]()
    real = torch.Tensor.tolist

    def tolist(tensor: torch.Tensor) -> Any:
        reads.append(tensor.numel())
        return real(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    new = CachedRow(0.5, 0, 8, IMAGE - 5, None)
    expected, first = parts(forward, given, cache, [PLAIN[0], new, new])
    assert reads == []
    again = [PLAIN[0], *(CachedRow(0.5, 1, 8, IMAGE - 5, residual) for residual in first.residuals[1:])]
    velocities, output = parts(forward, given, cache, again)
    assert reads == [2]
    assert list(output.skipped) == [False, True, True]  # the inputs are the same
    own = slice(0, IMAGE - 5)
    assert torch.allclose(velocities[:, own], expected[:, own], atol=1e-5)


def test_all_rows_are_selected_without_a_copy() -> None:
    states = torch.zeros(ROWS, 2)
    assert Rows(range(ROWS), ROWS, CPU).select(states) is states
    assert Rows([1], ROWS, CPU).select(torch.arange(ROWS)).tolist() == [1]
