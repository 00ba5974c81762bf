"""Packed and int8 matrix products."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genserve_backend.matrices import Int8Linear, PackedLinear, has_int8, use_int8_matrices, use_packed_matrices

needs_int8 = pytest.mark.skipif(not has_int8(), reason="requires VNNI")
needs_avx512 = pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="requires AVX-512")


def block() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Sequential(nn.Linear(96, 32, bias=False)))


@needs_avx512
@pytest.mark.parametrize("shape", [(48,), (1, 48), (7, 48), (2, 3, 48), (0, 48)], ids=str)
def test_packed_linear_gives_the_same_product(shape: tuple[int, ...]) -> None:
    model = block()
    inputs = torch.randn(shape)
    with torch.inference_mode():
        expected = model(inputs)
        use_packed_matrices(model)
        assert [type(part) for part in model.modules() if isinstance(part, nn.Linear)] == [PackedLinear] * 2
        torch.testing.assert_close(model(inputs), expected, rtol=1e-5, atol=1e-6)


def test_other_dtypes_are_not_replaced() -> None:
    model = block().to(torch.bfloat16)
    use_packed_matrices(model)
    assert {type(part) for part in model.modules() if isinstance(part, nn.Linear)} == {nn.Linear}


def test_nothing_is_replaced_without_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    model = block()
    use_packed_matrices(model)
    assert {type(part) for part in model.modules() if isinstance(part, nn.Linear)} == {nn.Linear}


@needs_int8
@pytest.mark.parametrize("shape", [(48,), (1, 48), (7, 48), (2, 3, 48)], ids=str)
def test_int8_linear_is_close(shape: tuple[int, ...]) -> None:
    model = block()
    inputs = torch.randn(shape)
    with torch.inference_mode():
        expected = model(inputs)
        use_int8_matrices(model)
        assert sum(isinstance(part, Int8Linear) for part in model.modules()) == 2
        error = (model(inputs) - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.02


@needs_int8
def test_int8_rows_are_independent() -> None:
    layer = Int8Linear(nn.Linear(48, 96))
    rows = torch.randn(64, 48)
    with torch.inference_mode():
        together = layer(torch.cat([rows, 1000 * torch.randn(3, 48)]))[:64]
        assert torch.equal(torch.cat([layer(row[None]) for row in rows]), together)


@needs_int8
def test_int8_of_zeros_and_nans() -> None:
    layer = Int8Linear(plain := nn.Linear(48, 96))
    rows = torch.zeros(2, 48)
    rows[1, 3] = torch.nan
    with torch.inference_mode():
        result = layer(rows)
    torch.testing.assert_close(result[0], plain.bias.detach())
    assert result[1].isnan().all()


@needs_int8
def test_int8_of_zero_weights() -> None:
    plain = nn.Linear(48, 8)
    nn.init.zeros_(plain.weight)
    with torch.inference_mode():
        torch.testing.assert_close(Int8Linear(plain)(torch.randn(3, 48)), plain.bias.detach().expand(3, 8))
