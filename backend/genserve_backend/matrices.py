"""The matrix products of a model on a CPU: by oneDNN, from weights that are laid out for it once.

torch hands float32 products to the BLAS that it was built with. That is MKL, which leaves half of the vector units of
AMD's Zen 5 idle: on a core ``nn.Linear`` reaches 108 GFLOP/s, oneDNN 250. The results differ by float32's
rounding. torch.compile uses the same operators when it freezes a model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEVELS = 127
"""Steps from zero to the largest number, in int8."""
SMALLEST = 1e-12
"""What the largest number of a row is taken for, at least: a row of zeros has a scale too."""


def use_packed_matrices(model: nn.Module) -> None:
    """Let the float32 ``nn.Linear`` parts of `model` compute by oneDNN, where that is to be had.

    Nothing else changes: neither the names of the parts nor their arguments. The weights can then be used by their
    layer alone, and no longer be trained or saved.
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX512" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        _replace(model, PackedLinear)


def use_int8_matrices(model: nn.Module) -> None:
    """Let the float32 ``nn.Linear`` parts of `model` compute in int8; see `Int8Linear`.

    Only where `has_int8`.
    """
    _replace(model, Int8Linear)


def has_int8() -> bool:
    """Whether this CPU multiplies int8 matrices without loss (VNNI)."""
    return bool(torch.cpu._is_vnni_supported()) and hasattr(torch.ops.onednn, "qlinear_pointwise")


class PackedLinear(nn.Linear):
    """``x @ weight.T + bias`` for ``[..., in_features]``, without gradients.

    Args:
        plain: Whose weights are taken over; it is of no use afterwards.
    """

    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        weight = torch.ops.mkldnn._reorder_linear_weight(plain.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if plain.bias is None else nn.Parameter(plain.bias.detach(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """The product."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        return product


class Int8Linear(nn.Module):
    """`PackedLinear` in int8: weights have one scale for each output, inputs one for each row, as they come.

    With a scale for each row a result depends on its own row alone. (torch's dynamically quantized linear and ONNX
    Runtime's take one for the whole batch: a document's score then depends on what else is scored with it.)

    Args:
        plain: Whose weights are taken over; it is of no use afterwards.
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

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """The product; the input is rounded to 255 levels."""
        rows = input.reshape(-1, self.in_features)
        largest = torch.maximum(rows.amax(dim=1, keepdim=True), -rows.amin(dim=1, keepdim=True)).clamp_min_(SMALLEST)
        # To int8, which torch does quickly, and from there to uint8, which the operator takes.
        levels = (rows * (LEVELS / largest)).round_().to(torch.int8).view(torch.uint8).bitwise_xor_(128)
        product = torch.ops.onednn.qlinear_pointwise(
            levels, 1.0, 128, self._weight, self._scale, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return torch.addcmul(self._bias, product, largest / LEVELS).view(*input.shape[:-1], self.out_features)


def _replace(model: nn.Module, kind: type[PackedLinear] | type[Int8Linear]) -> None:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.weight.dtype == torch.float32 and child.weight.device.type == "cpu":
                setattr(parent, name, kind(child))
