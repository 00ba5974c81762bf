"""FLUX's quantized layers, which layers they replace, and the devices that their dtypes need."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from torch import nn

from genserve_backend.checkpoints import CheckpointError
from genserve_backend.flux import precision
from genserve_backend.flux.build import build, load_pipeline
from genserve_backend.flux.checkpoint import FluxCheckpoint
from genserve_backend.flux.dtypes import unsupported
from genserve_backend.flux.quantized import Float8Linear, Int8WeightLinear, QuantizedLinear
from genserve_backend.matrices import Int8Linear, has_int8
from genserve_backend.settings import FluxSettings
from random_flux import write_random_flux

DEMO = Path(__file__).parents[2] / "demo" / "flux"
needs_int8 = pytest.mark.skipif(not has_int8(), reason="requires VNNI")
DTYPES = [
    pytest.param(Float8Linear, torch.bfloat16, 0.05, id="float8"),
    pytest.param(Int8WeightLinear, torch.bfloat16, 0.015, id="int8-weights-bfloat16"),
    pytest.param(Int8WeightLinear, torch.float16, 0.015, id="int8-weights-float16"),
    pytest.param(Int8WeightLinear, torch.float32, 0.015, id="int8-weights-float32"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> FluxCheckpoint:
    path = tmp_path_factory.mktemp("quantized") / "dev"
    write_random_flux(path)
    return FluxCheckpoint.load(path)


def linear(dtype: torch.dtype, *, bias: bool = True, scale: float = 1.0) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(48, 96, bias=bias)
    layer.weight.data *= scale
    return layer.to(dtype)


@pytest.mark.parametrize("shape", [(48,), (7, 48), (2, 3, 48)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("kind", "dtype", "tolerance"), DTYPES)
@torch.inference_mode()
def test_product_is_close(
    kind: type[QuantizedLinear], dtype: torch.dtype, tolerance: float, bias: bool, shape: tuple[int, ...]
) -> None:
    plain = linear(dtype, bias=bias)
    inputs = torch.randn(shape, dtype=dtype)
    expected = plain(inputs).float()
    result = kind(plain)(inputs)
    assert (result.dtype, result.shape) == (dtype, expected.shape)
    error = (result.float() - expected).norm() / expected.norm()
    assert 1e-5 < error < tolerance


@pytest.mark.parametrize(("kind", "dtype", "tolerance"), DTYPES)
@torch.inference_mode()
def test_small_weights_keep_their_scale(kind: type[QuantizedLinear], dtype: torch.dtype, tolerance: float) -> None:
    plain = linear(dtype, bias=False, scale=0.02)
    inputs = torch.randn(7, 48, dtype=dtype)
    expected = plain(inputs).float()
    assert (kind(plain)(inputs).float() - expected).norm() < 2 * tolerance * expected.norm()


@pytest.mark.parametrize(("kind", "dtype"), [(Float8Linear, torch.bfloat16), (Int8WeightLinear, torch.bfloat16)])
@torch.inference_mode()
def test_layer_is_one_graph_of_any_number_of_rows(kind: type[QuantizedLinear], dtype: torch.dtype) -> None:
    """In inference mode, where tensor subclasses and compilers disagree."""
    layer = kind(linear(dtype))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 5, 8):
        inputs = torch.randn(2, rows, 48, dtype=dtype)
        torch.testing.assert_close(compiled(inputs), layer(inputs))


@torch.inference_mode()
def test_float8_rows_are_independent() -> None:
    layer = Float8Linear(linear(torch.bfloat16))
    rows = torch.randn(16, 48, dtype=torch.bfloat16)
    together = layer(torch.cat([rows, 1000 * torch.randn(3, 48, dtype=torch.bfloat16)]))[:16]
    assert torch.equal(torch.cat([layer(row[None]) for row in rows]), together)


@pytest.mark.parametrize(("kind", "dtype", "tolerance"), DTYPES)
@torch.inference_mode()
def test_zeros_and_nans(kind: type[QuantizedLinear], dtype: torch.dtype, tolerance: float) -> None:
    plain = linear(dtype)
    plain.weight.data[5] = 0.0
    layer = kind(plain)
    rows = torch.randn(3, 48, dtype=dtype)
    rows[0] = 0.0
    rows[1, 3] = torch.nan
    result = layer(rows)
    torch.testing.assert_close(result[0], plain.bias.detach())
    torch.testing.assert_close(result[2, 5], plain.bias.detach()[5])
    assert result[1].isnan().sum() >= 95  # torch may skip a product with zeros


def kinds(pipeline: FluxPipeline, part: str) -> Counter[str]:
    model = getattr(pipeline, part)
    return Counter(type(module).__name__ for module in model.modules() if hasattr(module, "in_features"))


BLOCK_MATRICES = 6 * (8 + 4) + 12 * (3 + 2)
MODULATIONS = 6 * 2 + 12
OTHERS = 2 + 2 * 3 + 2
"""Two embedders, two matrices for each of time, guidance and pooled prompts, the last modulation and projection."""


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("fp8", {"Float8Linear": BLOCK_MATRICES, "Int8WeightLinear": MODULATIONS, "Linear": OTHERS}),
        ("int8", {"Int8Linear": BLOCK_MATRICES, "Linear": MODULATIONS + OTHERS}),
        ("int8wo", {"Int8WeightLinear": BLOCK_MATRICES + MODULATIONS, "Linear": OTHERS}),
        ("bfloat16", {"Linear": BLOCK_MATRICES + MODULATIONS + OTHERS}),
    ],
)
def test_only_matrices_of_the_blocks_are_quantized(
    dtype: Any, expected: dict[str, int], checkpoint: FluxCheckpoint
) -> None:
    if dtype == "int8" and not has_int8():
        pytest.skip("requires VNNI")
    loaded = torch.bfloat16 if dtype != "int8" else torch.float32
    pipeline = FluxPipeline.from_pretrained(checkpoint.path, dtype=loaded)
    before = kinds(pipeline, "text_encoder_2")
    precision.quantize(pipeline, FluxSettings(model_path=checkpoint.path, dtype=dtype), "cpu")
    assert kinds(pipeline, "transformer") == expected
    assert kinds(pipeline, "text_encoder_2") == before
    assert pipeline.transformer.dtype == loaded


def test_t5_can_be_quantized_alone(checkpoint: FluxCheckpoint) -> None:
    plain = load_pipeline(checkpoint, FluxSettings(model_path=checkpoint.path), "cpu")
    settings = FluxSettings(model_path=checkpoint.path, t5_dtype="int8wo")
    pipeline = load_pipeline(checkpoint, settings, "cpu")
    assert kinds(pipeline, "text_encoder_2") == {"Int8WeightLinear": 2 * (4 + 3)}
    assert kinds(pipeline, "transformer") == kinds(plain, "transformer")
    with torch.inference_mode():
        exact, result = (each.encode_prompt("a cat", max_sequence_length=64)[0] for each in (plain, pipeline))
    error = (exact - result).norm() / exact.norm()
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize(
    ("dtype", "device", "capability", "int8", "words"),
    [
        ("auto", "cpu", None, False, None),
        ("bfloat16", "cuda:0", (7, 5), False, None),
        ("int8wo", "cpu", None, False, None),
        ("int8wo", "cuda:0", (7, 5), False, None),
        ("int8", "cpu", None, True, None),
        ("int8", "cpu", None, False, "CPU that has VNNI"),
        ("int8", "cuda:0", (9, 0), True, "CPU that has VNNI, and this instance is on cuda:0"),
        ("fp8", "cpu", None, True, "capability 8.9 or higher, and this instance is on cpu"),
        ("fp8", "cuda:1", (8, 6), False, "capability 8.9 or higher, and cuda:1 has 8.6"),
        ("fp8", "cuda:0", (8, 9), False, None),
        ("fp8", "cuda:0", (12, 0), False, None),
        ("fp8", "cuda:0", None, False, None),
    ],
)
def test_devices_of_the_dtypes(
    dtype: Any, device: str, capability: tuple[int, int] | None, int8: bool, words: str | None
) -> None:
    reason = unsupported(dtype, device, capability=capability, has_int8=int8)
    assert (reason is None) == (words is None)
    assert reason is None or words in reason


def test_engine_does_not_start_with_a_dtype_that_its_device_lacks(checkpoint: FluxCheckpoint) -> None:
    settings = FluxSettings(model_path=checkpoint.path, dtype="fp8")
    with pytest.raises(CheckpointError, match="FLUX_DTYPE=fp8 needs a GPU"):
        build(settings, "cpu", lambda event: None)


def test_capability_of_the_gpu_counts(checkpoint: FluxCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def capability(device: str) -> tuple[int, int]:
        asked.append(device)
        return (8, 6)

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    settings = FluxSettings(model_path=checkpoint.path, dtype="fp8")
    with pytest.raises(CheckpointError, match=r"cuda:1 has 8\.6"):
        precision.require_support(settings, "cuda:1")
    assert asked == ["cuda:1"]


@pytest.mark.parametrize(
    ("changes", "device", "expected"),
    [
        ({}, "cuda:0", False),
        ({"dtype": "float16"}, "cuda:0", False),
        ({"dtype": "fp8"}, "cuda:0", True),
        ({"t5_dtype": "int8wo"}, "cuda:0", True),
        ({"offload": "idle"}, "cuda:0", True),
        ({"dtype": "int8wo"}, "cpu", False),
    ],
    ids=str,
)
def test_weights_without_room_on_a_gpu_start_on_the_host(changes: Any, device: str, expected: bool) -> None:
    assert precision.starts_on_host(FluxSettings(model_path=Path("m"), **changes), device) == expected


def test_tiles_are_half_of_the_native_size() -> None:
    checkpoint = FluxCheckpoint.load(DEMO)
    plain = load_pipeline(checkpoint, FluxSettings(model_path=DEMO), "cpu").vae
    tiled = load_pipeline(checkpoint, FluxSettings(model_path=DEMO, vae_tiling=True), "cpu").vae
    side = checkpoint.native_size
    latent = side // 8
    sizes: list[tuple[int, ...]] = []
    tiled.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    picture = -torch.ones(2, 3, side, side)
    picture[0, 0, side // 4 : -side // 4, side // 4 : -side // 4] = 1.0
    with torch.inference_mode():
        latents = plain.encode(picture).latent_dist.mode()
        whole, parts = (vae.decode(latents, return_dict=False)[0] for vae in (plain, tiled))
        assert {(shape[0], *shape[2:]) for shape in sizes} == {
            (1, height, width) for height in (latent // 2, latent // 4) for width in (latent // 2, latent // 4)
        }
        assert parts.shape == whole.shape
        assert 0 < (parts - whole).abs().mean() < 0.1
        small = latents[:, :, : latent // 2, : latent // 2]
        whole, parts = (vae.decode(small, return_dict=False)[0] for vae in (plain, tiled))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


@needs_int8
def test_int8_is_named_in_the_answer(checkpoint: FluxCheckpoint) -> None:
    settings = FluxSettings(model_path=checkpoint.path, dtype="int8")
    assert precision.dtype_name(settings, torch.float32) == "int8"
    assert precision.dtype_name(FluxSettings(model_path=checkpoint.path), torch.bfloat16) == "bfloat16"
    pipeline = load_pipeline(checkpoint, settings, "cpu")
    assert sum(isinstance(module, Int8Linear) for module in pipeline.transformer.modules()) == BLOCK_MATRICES
