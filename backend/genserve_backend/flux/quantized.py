"""Quantized linear layers for FLUX: float8 products, and int8 weights.

torchao's layers call the same operator of torch for float8. These here hold plain tensors instead of subclasses, so
they work under `torch.inference_mode`, can be compiled, and can be copied between host and device by `offload`; and
diffusers imports torchao at every start if it is installed. `matrices.Int8Linear` is the form for CPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import ScalingType

from genserve_backend.matrices import has_onednn, onednn_linear

FLOAT8 = torch.float8_e4m3fn
FLOAT8_LARGEST = 448.0
"""Largest value of float8 e4m3fn."""
INT8_LARGEST = 127
SMALLEST = 1e-12
"""Lower limit of a row's largest value, so that a row of zeros has a scale."""


class QuantizedLinear(nn.Module):
    """``input @ weight.T + bias`` for ``[..., in_features]`` with quantized weights, without gradients.

    Weights, scales and bias are buffers, so the model's dtype is still that of its other layers.

    Args:
        plain: The layer to replace; it must not be used afterwards.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        weight, scale = self.quantize(plain.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if plain.bias is None else plain.bias.detach())

    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return quantized weights ``[out, in]``, and one scale per output, ``[out, 1]``."""
        raise NotImplementedError


class Float8Linear(QuantizedLinear):
    """Products in float8 with one scale per output and one per input row.

    With a scale per row, a row's result does not depend on the other rows: an image not on its batch. Inputs and
    outputs are bfloat16; sums are in float32. Both features have to be multiples of 16.
    """

    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return float8 weights, and float32 scales."""
        return to_float8(weight)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return the product."""
        rows, scale = to_float8(input.reshape(-1, self.in_features))
        product: Tensor = functional.scaled_mm(
            rows,
            self.weight.t(),
            scale,
            ScalingType.RowWise,
            self.scale.t(),
            ScalingType.RowWise,
            bias=self.bias,
            output_dtype=input.dtype,
            use_fast_accum=True,
        )
        return product.view(*input.shape[:-1], self.out_features)


class Int8WeightLinear(QuantizedLinear):
    """Weights in int8 with one scale per output, multiplied in the dtype of the input.

    For memory: products are as fast as without, less the time to convert the weights.

    Args:
        plain: The layer to replace; it must not be used afterwards.
    """

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain)
        self._has_onednn = has_onednn()

    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return int8 weights, and scales in the dtype of the weights."""
        # The levels are taken from the rounded scale: in bfloat16, its error would scale a whole output.
        scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST).float() / INT8_LARGEST
        scale = scale.to(weight.dtype)
        scale = torch.where(scale > 0, scale, torch.finfo(weight.dtype).tiny)  # float16 rounds the smallest to 0
        levels = (weight.float() / scale.float()).round_().clamp_(-INT8_LARGEST, INT8_LARGEST)
        return levels.to(torch.int8), scale

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return the product."""
        weight = self.weight * self.scale
        if self._has_onednn and input.device.type == "cpu" and input.dtype == torch.float32:
            return onednn_linear(input, weight, self.bias)
        return functional.linear(input, weight, self.bias)


def to_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows in float8, and their float32 scales ``[rows, 1]``: the largest value of each becomes about 448.

    The factor is rounded to the dtype of the rows, so that a GPU passes over them only three times without a compiler.
    The scale is that of the rounded factor. Values of up to 464 become 448.
    """
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True)
    factor = (FLOAT8_LARGEST / largest.float().clamp_min(SMALLEST)).to(rows.dtype)
    return (rows * factor).to(FLOAT8), factor.float().reciprocal()
