"""The matrix products of a model on a CPU: by oneDNN, from weights that are laid out for it once.

torch hands float32 products to the BLAS that it was built with. That is MKL, which on CPUs that are not Intel's leaves
half of the vector units idle: on a Zen 5 core ``nn.Linear`` reaches 108 GFLOP/s, oneDNN 250. Elsewhere the two are
level. The results differ by float32's rounding. torch.compile uses the same operator when it freezes a model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def use_packed_matrices(model: nn.Module) -> None:
    """Let the float32 ``nn.Linear`` parts of `model` compute by oneDNN, where that is to be had.

    Nothing else changes: neither the names of the parts nor their arguments. The weights can then be used by their
    layer alone, and no longer be trained or saved.
    """
    if not _available():
        return
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.weight.dtype == torch.float32 and child.weight.device.type == "cpu":
                setattr(parent, name, PackedLinear(child))


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

    def forward(self, input: Tensor) -> Tensor:
        """The product."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        return product


def _available() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
