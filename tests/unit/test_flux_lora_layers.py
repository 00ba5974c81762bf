"""Linear layers with low-rank products per batch row."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from genserve_backend.flux.lora.cache import Adapter, Combination, Part
from genserve_backend.flux.lora.folder import AdapterFile, Version
from genserve_backend.flux.lora.layers import AdaptedModel, add_low_rank
from genserve_backend.flux.lora.weights import LowRank, Shape
from genserve_backend.matrices import Int8Linear, PackedLinear, has_int8, use_int8_matrices, use_packed_matrices

CPU = torch.device("cpu")
ROWS, LENGTH, WIDTH = 5, 7, 16


class Block(nn.Module):
    """Three layers, one of which takes rows without a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 2 * WIDTH)
        self.second = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.modulation = nn.Linear(WIDTH, WIDTH)

    def forward(self, states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self.second(self.first(states).relu()) + self.modulation(conditioning)[:, None]
        return product


class Model(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            states = block(states, conditioning)
        return states


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(ROWS, LENGTH, WIDTH), torch.randn(ROWS, WIDTH)


def adapted(model: nn.Module) -> AdaptedModel:
    return AdaptedModel(model, "transformer", device=CPU, dtype=torch.float32)


def combination(model: AdaptedModel, *ranks: int, weight: float = 0.5, layers: str = "") -> Combination:
    """Return adapters of the given ranks for the layers whose names contain `layers`."""
    parts = []
    for rank in ranks:
        weights = {
            name: LowRank(torch.randn(shape.inputs, rank), torch.randn(rank, shape.outputs) / 4)
            for name, shape in model.shapes.items()
            if layers in name
        }
        file = AdapterFile(str(len(parts)), Path(), Version(0, 0, 0))
        parts.append(Part(Adapter(file, {"transformer": weights}, CPU), weight))
    return Combination(parts)


def merged(model: nn.Module, adapters: Combination | None) -> nn.Module:
    """Return a copy of a plain model with adapters merged into its weights."""
    model = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if adapters and isinstance(layer, nn.Linear):
            for low_rank, weight in adapters.products("transformer", name):
                layer.weight.add_((low_rank.down @ low_rank.up).T * weight)
    return model


def assert_rows(
    plain: nn.Module, output: torch.Tensor, inputs: tuple[torch.Tensor, ...], rows: list[Combination | None]
) -> None:
    for number, adapters in enumerate(rows):
        own = tuple(each[number : number + 1] for each in inputs)
        assert torch.allclose(output[number : number + 1], merged(plain, adapters)(*own), atol=1e-3, rtol=1e-3), number


def test_each_row_has_its_own_adapters(inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    plain = Model()
    model = copy.deepcopy(plain)
    lora = adapted(model)
    one, several = combination(lora, 3), combination(lora, 2, 9, weight=-0.3)
    some = combination(lora, 4, layers="second")
    rows = [one, None, several, some, one]
    lora.select(rows)
    assert_rows(plain, model(*inputs), inputs, rows)


@pytest.mark.parametrize("length", [1, 16, 80])
def test_rows_with_adapters_are_the_same_alone_to_the_bit(length: int) -> None:
    states, down, up = torch.randn(ROWS, length, 64), torch.randn(ROWS, 8, 64), torch.randn(ROWS, 8, 96)
    product = torch.randn(ROWS, length, 96)
    together = add_low_rank(product.clone(), states, down, up)
    # Zeros: another row of the batch may have a higher rank.
    wide_down, wide_up = (torch.cat((each, torch.zeros_like(each)), dim=1) for each in (down, up))
    for row in range(ROWS):
        own = slice(row, row + 1)
        alone = add_low_rank(product[own].clone(), states[own], down[own], up[own])
        wide = add_low_rank(product[own].clone(), states[own], wide_down[own], wide_up[own])
        assert torch.equal(together[own], alone)
        assert torch.equal(wide, alone)


def test_rows_without_adapters_are_unchanged_to_the_bit(inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = Model()
    expected = model(*inputs)
    lora = adapted(model)
    assert torch.equal(model(*inputs), expected)
    lora.select([None] * ROWS)
    assert torch.equal(model(*inputs), expected)
    one = combination(lora, 8)
    lora.select([one, None, None, None, one])
    mixed = model(*inputs)
    assert torch.equal(mixed[1:4], expected[1:4])
    assert not torch.equal(mixed[0], expected[0])
    lora.select([None] * ROWS)
    assert torch.equal(model(*inputs), expected)


def test_infinite_row_stays_alone(inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = Model()
    lora = adapted(model)
    huge, fine = combination(lora, 4, weight=1e38), combination(lora, 4)
    lora.select([fine, None])
    expected = model(*(each[:2] for each in inputs))
    lora.select([huge, fine, None])
    states, conditioning = (torch.cat([each[:1], each[:2]]) for each in inputs)
    output = model(states, conditioning)
    assert not torch.isfinite(output[0]).all()
    assert torch.allclose(output[1:], expected)


def test_names_and_weights_stay_the_same() -> None:
    model = Model()
    names, state = [name for name, _ in model.named_modules()], list(model.state_dict())
    lora = adapted(model)
    lora.select([combination(lora, 2)])
    assert [name for name, _ in model.named_modules()] == names
    assert list(model.state_dict()) == state
    assert isinstance(model.blocks[0].first, nn.Linear)
    assert lora.shapes["blocks.1.first"] == Shape(WIDTH, 2 * WIDTH)


@pytest.mark.parametrize("kind", [PackedLinear, Int8Linear], ids=["packed", "int8"])
def test_other_kinds_of_layers_are_adapted(kind: type[nn.Module], inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    plain = Model()
    model = copy.deepcopy(plain)
    if kind is Int8Linear and not has_int8():
        pytest.skip("this CPU has no VNNI")
    (use_int8_matrices if kind is Int8Linear else use_packed_matrices)(model)
    if not isinstance(model.blocks[0].first, kind):
        pytest.skip("this CPU has no AVX-512")
    expected = model(*inputs)
    lora = adapted(model)
    rows = [combination(lora, 4), None, None, None, combination(lora, 2)]
    lora.select(rows)
    output = model(*inputs)
    assert torch.equal(output[1:4], expected[1:4])
    whole = merged(plain, rows[0])(*(each[:1] for each in inputs))
    assert (output[0] - whole[0]).abs().mean() < 0.05 * whole.abs().mean()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(*inputs), output)


def test_slots_are_used_again(inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    plain = Model()
    model = copy.deepcopy(plain)
    lora = adapted(model)
    held = [combination(lora, rank) for rank in (8, 3, 5)]
    lora.select(held)
    stacks = [id(layer.down) for layer in lora._layers.values()]
    for _ in range(6):
        held = [held[0], held[2], combination(lora, 2)]
        rows = [None, *held, held[0]]
        lora.select(rows)
        assert [id(layer.down) for layer in lora._layers.values()] == stacks
        assert_rows(plain, model(*inputs), inputs, rows)


def test_stacks_grow_and_shrink_with_their_users() -> None:
    lora = adapted(Model())
    small = combination(lora, 2)
    lora.select([small])
    size = lora.nbytes
    large = [combination(lora, 40) for _ in range(3)]
    lora.select([small, *large])
    assert lora.nbytes > 5 * size
    del large
    lora.select([small, None])
    other = combination(lora, 3)
    lora.select([small, other])
    assert lora.nbytes == 2 * size
    del small, other
    lora.trim()
    assert lora.nbytes == 0


def test_stacks_stay_while_anybody_holds_a_combination() -> None:
    lora = adapted(Model())
    held = combination(lora, 2)
    lora.select([held])
    lora.select([None])
    lora.trim()
    assert lora.nbytes > 0


def test_unchanged_rows_copy_nothing(
    inputs: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = adapted(Model())
    rows = [combination(lora, 2), None]
    lora.select(rows)
    slots = lora._selection.slots
    monkeypatch.setattr(lora, "_fill", None)
    lora.select(list(rows))
    assert lora._selection.slots is slots
    lora.select(rows[:1])
    lora.select(rows)
    assert lora._selection.slots is slots


def test_other_users_leave_when_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = adapted(Model())
    others = [combination(lora, 2) for _ in range(3)]
    lora.select(others)
    real = lora._allocate

    def allocate(ranks: dict[str, int], capacity: int) -> None:
        if capacity > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(ranks, capacity)

    monkeypatch.setattr(lora, "_allocate", allocate)
    one = combination(lora, 9)
    lora.select([one])
    assert list(lora._slots) == [one]
    with pytest.raises(torch.OutOfMemoryError):
        lora.select([one, others[0]])
    assert lora.nbytes == 0


def test_compiled_blocks_have_few_graphs() -> None:
    torch._dynamo.reset()
    model = Model()
    counter = CompileCounter()
    expected = copy.deepcopy(model)
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True, dynamic=True)
    lora = adapted(model)
    draw = torch.Generator().manual_seed(1)
    for number in range(12):
        rows = 2 + number % 5
        length = 3 + number % 4
        inputs = torch.randn(rows, length, WIDTH, generator=draw), torch.randn(rows, WIDTH, generator=draw)
        wanted = [None, *(combination(lora, 1 + 7 * (number % 3), layers=layer) for layer in ("first", "blocks.1"))]
        chosen = [wanted[(row + number) % 3] if number % 4 else None for row in range(rows)]
        lora.select(chosen)
        assert_rows(expected, model(*inputs), inputs, chosen)
    assert counter.frame_count <= 2 * 2
    torch._dynamo.reset()
