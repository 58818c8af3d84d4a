"""8-bit integers, symmetric, one fp32 scale for each output channel."""

from typing import ClassVar

import torch
from torch import Tensor

from rq_ep.formats.kernels.blocked_product import has_fast_products
from rq_ep.formats.kernels.unpack import int8_to_bf16, scale_channels
from rq_ep.formats.quantized import Fields, Parts, Quantized

_MAX_LEVEL = 127
# Up to so many rows a CPU with fast products in bf16, or one without, multiplies with packed weights. The kernel needs
# bf16, and a multiple of 16 inputs: with others it returns garbage, or ends the process.
_PACKED_ROWS = {True: 8, False: 24}
_PACKED_MULTIPLE = 16


class Int8(Quantized):
    """Round to nearest."""

    name: ClassVar[str] = "int8"
    max_error: ClassVar[float] = 0.5 / _MAX_LEVEL * (1 + 1e-5)

    def fields(self, num_out: int, num_in: int) -> Fields:
        return {"levels": ((num_out, num_in), torch.int8), "scale": ((num_out,), torch.float32)}

    def quantize(self, weight_OI: Tensor) -> Parts:
        largest_O = torch.maximum(weight_OI.amax(1), -weight_OI.amin(1))  # without a copy, as `abs` makes
        scale_O = (largest_O / _MAX_LEVEL).clamp_(min=torch.finfo(torch.float32).tiny)
        levels = (weight_OI / scale_O[:, None]).round_().clamp_(-_MAX_LEVEL, _MAX_LEVEL)
        return {"levels": levels.to(torch.int8), "scale": scale_O}

    def expand(self, parts: Parts, num_in: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        if dtype != torch.bfloat16:  # fp16 would overflow in a sum of levels
            return (parts["levels"] * parts["scale"][:, None]).to(dtype), None
        return int8_to_bf16(parts["levels"]), parts["scale"]  # exact: bf16 holds whole numbers up to 256

    def product(self, x_NI: Tensor, parts: Parts) -> Tensor:
        if not can_multiply_packed(x_NI):
            return super().product(x_NI, parts)
        ones = x_NI.new_ones(len(parts["scale"]))  # the kernel's scales would be bf16
        return scale_channels(torch._weight_int8pack_mm(x_NI.contiguous(), parts["levels"], ones), parts["scale"])


def can_multiply_packed(x_NI: Tensor) -> bool:
    """Whether the CPU's kernel for packed int8 weights computes rows [N, I] correctly, and is faster for so few."""
    num_rows, num_in = x_NI.shape
    return (
        x_NI.device.type == "cpu"
        and x_NI.dtype == torch.bfloat16
        and 0 < num_rows <= _PACKED_ROWS[has_fast_products(x_NI.dtype)]
        and num_in % _PACKED_MULTIPLE == 0
    )
