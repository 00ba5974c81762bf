"""Matrix products on a CPU by oneDNN, with weights in its own layout.

torch runs float32 products with MKL, which leaves half of the vector units of AMD's Zen 5 idle: per core ``nn.Linear``
reaches 108 GFLOP/s and oneDNN 250. The results differ by float32 rounding. torch.compile uses the same operators when
it freezes a model.
"""

from __future__ import annotations

from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

LEVELS = 127
"""Largest int8 value in use."""
SMALLEST = 1e-12
"""Lower limit of a row's largest value, so that a row of zeros has a scale."""


def use_packed_matrices(model: nn.Module) -> None:
    """Replace the float32 ``nn.Linear`` layers of `model` by `PackedLinear`, if this CPU supports it.

    Names and arguments of the layers stay the same. Only their layer can use the packed weights; they can no longer be
    trained or saved.
    """
    if has_onednn():
        _replace(model, PackedLinear)


def use_int8_matrices(model: nn.Module) -> None:
    """Replace the float32 ``nn.Linear`` layers of `model` by `Int8Linear`. Requires `has_int8`."""
    _replace(model, Int8Linear)


def has_onednn() -> bool:
    """Return whether oneDNN's float32 products are available and faster than torch's own."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
    """Return ``input @ weight.T + bias`` in float32 for weights that are packed or not. Requires `has_onednn`."""
    # Inductor compiles oneDNN's operator for constant weights only.
    operator = torch.ops.genserve.linear if torch.compiler.is_compiling() else _linear
    product: Tensor = operator(input, weight, bias)
    return product


def has_int8() -> bool:
    """Return whether this CPU multiplies int8 matrices exactly (VNNI)."""
    return bool(torch.cpu._is_vnni_supported()) and hasattr(torch.ops.onednn, "qlinear_pointwise")


class Packed(nn.Module):
    """Mixin for a linear layer with weights in a layout of oneDNN's own.

    Inductor does not take such weights as arguments: compiled code finds the layer by its number.
    """

    in_features: int
    out_features: int

    def multiply(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return the layer's product."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return the product, with an operator of its own in compiled code."""
        if torch.compiler.is_compiling():
            product: Tensor = torch.ops.genserve.packed_linear(input, self.number, self.out_features)
            return product
        return self.multiply(input)

    def give_number(self) -> None:
        """Make the layer known to compiled code."""
        number = next(_numbers)
        _packed[number] = self
        # A tensor: blocks share compiled code if they differ only in the values of their tensors.
        self.register_buffer("number", torch.tensor(number), persistent=False)


class PackedLinear(Packed, nn.Linear):
    """``x @ weight.T + bias`` for ``[..., in_features]``, without gradients.

    Args:
        plain: The layer to replace; it must not be used afterwards.
    """

    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        weight = torch.ops.mkldnn._reorder_linear_weight(plain.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if plain.bias is None else nn.Parameter(plain.bias.detach(), requires_grad=False)
        self.give_number()

    def multiply(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return the product."""
        return onednn_linear(input, self.weight, self.bias)


class Int8Linear(Packed):
    """`PackedLinear` in int8: weights have one scale per output, inputs one scale per row.

    With a scale per row, a result depends only on its own row. The dynamically quantized layers of torch and ONNX
    Runtime have one scale per batch: a document's score then depends on the other documents of its batch.

    Args:
        plain: The layer to replace; it must not be used afterwards.
    """

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        weight = plain.weight.detach()
        scale = weight.abs().amax(dim=1).clamp_min(SMALLEST) / LEVELS
        levels = (weight / scale[:, None]).round_().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(levels, None)
        self._scale = scale
        self._zeros = torch.zeros(self.out_features, dtype=torch.int32)
        self._bias = torch.zeros(self.out_features) if plain.bias is None else plain.bias.detach()
        self.give_number()

    def multiply(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return the product; the input is rounded to 255 levels."""
        rows = input.reshape(-1, self.in_features)
        largest = torch.maximum(rows.amax(dim=1, keepdim=True), -rows.amin(dim=1, keepdim=True)).clamp_min_(SMALLEST)
        # torch converts to int8 quickly; the operator expects uint8.
        levels = (rows * (LEVELS / largest)).round_().to(torch.int8).view(torch.uint8).bitwise_xor_(128)
        product = torch.ops.onednn.qlinear_pointwise(
            levels, 1.0, 128, self._weight, self._scale, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return torch.addcmul(self._bias, product, largest / LEVELS).view(*input.shape[:-1], self.out_features)


def low_rank_product(states: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return ``states @ down.T @ up``, ``[B, S, outputs]``, on a CPU; each batch row has its own factors.

    Each row is a product of its own. MKL adds those of a batch in another order than a single one, and int8 layers make
    a level of one in 127 of the last bit: an image would depend on the number of rows.

    Args:
        states: ``[B, S, inputs]``.
        down: ``[B, rank, inputs]``.
        up: ``[B, rank, outputs]``.
    """
    product: Tensor = torch.ops.genserve.low_rank(states, down, up)
    return product


_numbers = count()
_packed: WeakValueDictionary[int, Packed] = WeakValueDictionary()
"""Layers by their number."""


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return product


def _linear_shape(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def _multiply(input: Tensor, number: Tensor, out_features: int) -> Tensor:  # noqa: A002
    # Not the layer's forward: LoRA adapters change that in place, and compiled code already adds their change.
    return _packed[int(number)].multiply(input)


def _packed_shape(input: Tensor, number: Tensor, out_features: int) -> Tensor:  # noqa: A002
    return input.new_empty(*input.shape[:-1], out_features)


def _low_rank(states: Tensor, down: Tensor, up: Tensor) -> Tensor:
    product = _low_rank_shape(states, down, up)
    for row in range(len(states)):
        # The low rank comes first: as the last dimension of a product, it took three times as long.
        torch.mm(torch.mm(down[row], states[row].T).T, up[row], out=product[row])
    return product


def _low_rank_shape(states: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return states.new_empty(*states.shape[:-1], up.shape[-1])


_library = torch.library.Library("genserve", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("packed_linear(Tensor input, Tensor number, int out_features) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("packed_linear", _multiply, "CPU")  # type: ignore[no-untyped-call]
_library.impl("packed_linear", _packed_shape, "Meta")  # type: ignore[no-untyped-call]
_library.define("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("linear", _linear, "CPU")  # type: ignore[no-untyped-call]
_library.impl("linear", _linear_shape, "Meta")  # type: ignore[no-untyped-call]
_library.define("low_rank(Tensor states, Tensor down, Tensor up) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("low_rank", _low_rank, "CPU")  # type: ignore[no-untyped-call]
_library.impl("low_rank", _low_rank_shape, "Meta")  # type: ignore[no-untyped-call]


def _replace(model: nn.Module, kind: type[PackedLinear] | type[Int8Linear]) -> None:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.weight.dtype == torch.float32 and child.weight.device.type == "cpu":
                setattr(parent, name, kind(child))
